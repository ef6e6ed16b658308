"""Bodies and their parts, and what becomes of fields that they do not know.

A parameter that would change the answer and that we do not serve is refused by name, so nobody gets an
answer to another question than was asked. Other unknown fields are ignored with one log line for each name,
or refused too where the gateway is strict.
"""

import logging
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from services.core.errors import BadRequest

logger = logging.getLogger(__name__)

_UNKNOWN_FIELDS_MAX = 2048  # of a request: looking at one takes a microsecond
_UNKNOWN_NAMES_MAX = 1000  # bounds the memory of who has been warned about
_warned: set[str] = set()


class Body(BaseModel):
    """What clients send, or an object in it. Null means the default, as many clients send it."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    REFUSED: ClassVar[Mapping[str, Collection[object]]] = {}  # with the values of theirs that ask for nothing
    HARMLESS: ClassVar[Collection[str]] = ()  # known to change nothing that we promise


def check_fields(body: Body, *, strict: bool) -> None:
    """Raises BadRequest for the first field, at any depth, that is refused."""
    parts = list(_parts(body))
    if sum(len(part.model_extra or ()) for _, part in parts) > _UNKNOWN_FIELDS_MAX:
        raise BadRequest(f"The request has more than {_UNKNOWN_FIELDS_MAX} fields that have no meaning here.")
    for path, part in parts:
        for name, value in (part.model_extra or {}).items():
            if name in part.REFUSED:
                _refuse(part, path + name, name, value)
            elif name not in part.HARMLESS:
                _unknown(path + name, strict=strict)


def _parts(part: Body, path: str = "") -> Iterator[tuple[str, Body]]:
    """The body and all objects in it, with what their fields' names begin with."""
    yield path, part
    for name, value in part.__dict__.items():
        if isinstance(value, Body):
            yield from _parts(value, f"{path}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Body):
            for number, item in enumerate(value):
                yield from _parts(item, f"{path}{name}[{number}].")


def _refuse(part: Body, param: str, name: str, value: object) -> None:
    # 0 == False in Python, but `logprobs: 0` asks for something.
    if value is None or any(type(value) is type(none) and value == none for none in part.REFUSED[name]):
        return
    raise BadRequest(f"'{param}' is not supported by this server (got {reprlib.repr(value)}).", param)


def _unknown(param: str, *, strict: bool) -> None:
    if strict:
        raise BadRequest(f"Unknown parameter: '{param:.100}'.", param[:100], "unknown_parameter")
    name = re.sub(r"\[\d+\]", "[]", param)
    if name not in _warned and len(_warned) < _UNKNOWN_NAMES_MAX:
        _warned.add(name)
        logger.warning("ignoring the unknown request field %.100r", name)
