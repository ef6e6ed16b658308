"""The choices of one request: what each has delivered so far, and which of them still go on."""

from collections.abc import Sequence as Many

from services.gateway.worker_client import OutputToken


class Choices:
    def __init__(self, count: int) -> None:
        self.delivered: list[list[int]] = [[] for _ in range(count)]
        self._closed: set[int] = set()

    def __len__(self) -> int:
        return len(self.delivered)

    @property
    def begun(self) -> bool:
        return any(self.delivered)

    def next_index(self, choice: int) -> int:
        """The position of its next token."""
        return len(self.delivered[choice])

    def deliver(self, token: OutputToken) -> None:
        self.delivered[token.choice].append(token.token)
        if token.finish is not None:
            self.close(token.choice)

    def close(self, choice: int) -> None:
        """Nobody wants more of it: it has ended, or the client has what it asked for."""
        self._closed.add(choice)

    def goes_on(self, choice: int) -> bool:
        return choice not in self._closed

    def alike(self, choices: Many[int]) -> list[tuple[int, ...]]:
        """Those of `choices` that go on, together if they have delivered the same tokens: one attempt
        can serve them."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for choice in filter(self.goes_on, choices):
            groups.setdefault(tuple(self.delivered[choice]), []).append(choice)
        return [tuple(group) for group in groups.values()]
