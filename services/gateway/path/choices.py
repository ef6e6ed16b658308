"""The choices of one request: what each has delivered so far, and which of them still go on."""

from collections.abc import Sequence as Many

from services.gateway.workers.worker_client import OutputToken


class Choices:
    def __init__(self, count: int) -> None:
        self.delivered: list[list[int]] = [[] for _ in range(count)]
        self._closed: set[int] = set()
        self._unwanted: set[int] = set()  # closed here, which the worker does not know

    def __len__(self) -> int:
        return len(self.delivered)

    @property
    def begun(self) -> bool:
        return any(self.delivered)

    def next_index(self, choice: int) -> int:
        """The position of its next token."""
        return len(self.delivered[choice])

    def deliver(self, token: OutputToken) -> None:
        """Take note of a choice's next token, which may be its last."""
        self.delivered[token.choice].append(token.token)
        if token.finish is not None:
            self._closed.add(token.choice)

    def close(self, choice: int) -> None:
        """Nobody wants more of it."""
        if choice not in self._closed:
            self._closed.add(choice)
            self._unwanted.add(choice)

    def take_unwanted(self, served: Many[int]) -> set[int]:
        """Those of `served` that somebody closed since the last call, although their worker goes on."""
        if not self._unwanted:
            return set()
        taken = self._unwanted.intersection(served)
        self._unwanted -= taken
        return taken

    def goes_on(self, choice: int) -> bool:
        return choice not in self._closed

    def alike(self, choices: Many[int]) -> list[tuple[int, ...]]:
        """Those of `choices` that go on, together if they have delivered the same tokens: one attempt
        can serve them."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for choice in filter(self.goes_on, choices):
            groups.setdefault(tuple(self.delivered[choice]), []).append(choice)
        return [tuple(group) for group in groups.values()]
