"""What the answers on decode workers will still need: ours by what they lack, other gateways' by guess."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from router.state import Route
from services.core.worker_report import WorkerReport
from services.gateway.admission.forecast import AnswerLengths
from services.gateway.path.choices import Choices


@dataclass(slots=True, eq=False)
class Commitment:
    """One attempt's answers, from its route to its end."""

    route: Route
    choices: Choices
    served: tuple[int, ...]  # of the choices
    answer_tokens: int  # expected of each in all
    tokens_max: int  # that each may have

    def needs(self, block_size: int) -> tuple[int, int]:
        """Sequences that go on, and the blocks that they will still need. Asked for each attempt that runs
        whenever another one looks for a place."""
        running = blocks = 0
        for choice in self.served:
            if self.choices.goes_on(choice):
                running += 1
                left = self.answer_tokens - self.choices.next_index(choice)
                if left > 0:
                    blocks += -(-left // block_size)
        return running, blocks


class Commitments:
    def __init__(self, lengths: AnswerLengths) -> None:
        self._lengths = lengths
        self._open: defaultdict[str | None, set[Commitment]] = defaultdict(set)  # by decode worker

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))

    @contextmanager
    def made(self, commitment: Commitment) -> Iterator[None]:
        """Count it until the block ends."""
        worker_id = commitment.route.decode
        self._open[worker_id].add(commitment)
        try:
            yield
        finally:
            self._open[worker_id].remove(commitment)
            if not self._open[worker_id]:
                del self._open[worker_id]
            for choice in commitment.served:
                if not commitment.choices.goes_on(choice):
                    self._lengths.note(len(commitment.choices.delivered[choice]), commitment.tokens_max)

    def growth_blocks(self, report: WorkerReport, running: int) -> int:
        """Blocks that the answers on this decode worker will still need, `running` sequences. Those of
        other gateways are taken to be halfway through."""
        size = report.compatibility.block_size
        ours_running = blocks = 0
        for commitment in self._open.get(report.worker_id, ()):
            sequences, growth = commitment.needs(size)
            ours_running, blocks = ours_running + sequences, blocks + growth
        others = max(0, running - ours_running) if report.decodes else 0
        each = -(-self._lengths.expected(report.context_tokens_max) // (2 * size))
        return blocks + others * each
