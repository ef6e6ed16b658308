"""A piece of a tool call, as the answer formats need it."""

from collections.abc import Iterable
from typing import Literal, NamedTuple

from services.core.sampling import FinishReason

AnswerEnd = FinishReason | Literal["tool_calls"]  # the last one instead of "stop", if tools were called


class CallDelta(NamedTuple):
    number: int  # of the call in its answer
    arguments: str  # more of the JSON text
    id: str | None = None  # with its name: in the first piece of a call only
    name: str | None = None


def joined_calls(deltas: Iterable[CallDelta]) -> tuple[CallDelta, ...]:
    """All pieces of each call as one."""
    of_calls: dict[int, list[CallDelta]] = {}
    for delta in deltas:
        of_calls.setdefault(delta.number, []).append(delta)
    return tuple(
        pieces[0]._replace(arguments="".join(piece.arguments for piece in pieces))
        for pieces in of_calls.values()
    )
