"""Tracebacks for logs that must not hold what clients send: prompts, answers, keys.

A traceback shows lines of code, which hold nothing of a client's. The message of an exception may: a KeyError
quotes the key, a validation error the input. So only those are shown whose messages are made of code and
of the machine's state.
"""

import traceback
from collections.abc import Iterator

from services.core.errors import BadRequest, DiptychError

_ABOUT_US = (
    *(DiptychError, OSError, AssertionError, AttributeError, NameError, TypeError, ImportError),
    *(ArithmeticError, MemoryError, RuntimeError, SyntaxError),
)
_CHAIN_MAX = 10


def without_messages(error: BaseException) -> str:
    """As Python prints it, but with the messages left out that may quote a client."""
    return "\n".join(reversed(list(_chained(error)))).rstrip()


def _chained(error: BaseException) -> Iterator[str]:
    """The error, then what it came of."""
    for _ in range(_CHAIN_MAX):
        yield "".join([_HEAD, *traceback.format_tb(error.__traceback__), _named(error), "\n"])
        before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
        if before is None:
            return
        yield _CAUSED if error.__cause__ else _MEANWHILE
        error = before


def _named(error: BaseException) -> str:
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    shown = isinstance(error, _ABOUT_US) and not isinstance(error, BadRequest)
    message = str(error) if shown else "(its message is shown at --log-level DEBUG)"
    return f"{name}: {message}" if message else name


_HEAD = "Traceback (most recent call last):\n"
_CAUSED = "The above exception was the direct cause of the following exception:\n"
_MEANWHILE = "During handling of the above exception, another exception occurred:\n"
