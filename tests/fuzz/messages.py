"""Messages of our schema with anything in their fields.

Each message is drawn with a noise. Where it is 0, all fields have values that mean something to the receiver,
so that it gets through; where it is high, they hold borders of their types, nonsense, or nothing.
"""

import math
from dataclasses import dataclass
from random import Random
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

Field = FieldDescriptor
Known = dict[str, list[Any]]
_BORDERS = {
    Field.CPPTYPE_INT32: [0, 1, -1, 2, 3, 5, 7, 49_999, 50_000, 2**31 - 1, -(2**31)],
    Field.CPPTYPE_UINT32: [0, 1, 2, 3, 8, 20, 128, 2**31, 2**32 - 1],
    Field.CPPTYPE_UINT64: [0, 1, 2, 2**63, 2**64 - 1],
    Field.CPPTYPE_INT64: [0, 1, -1, 2**63 - 1, -(2**63)],
}
_PYTHON_TYPES: dict[int, type] = {
    Field.CPPTYPE_DOUBLE: float,
    Field.CPPTYPE_FLOAT: float,
    Field.CPPTYPE_BOOL: bool,
    Field.CPPTYPE_STRING: str,
}
_FLOATS = [0.0, -0.0, 1.0, 0.5, -1.0, 2.0, 1e-300, 1e300, 3e38, math.inf, -math.inf, math.nan]
_OFTEN_ABSENT = {"source", "prefix", "reach"}  # which changes what a message means
_LONG = "x" * 70_000


def random_message(kind: type[Message], random: Random, known: Known) -> Message:
    """`known` maps names of fields to values that mean something."""
    message = kind()
    _Filling(random, known, noise=random.choice([0.0, 0.0, 0.01, 0.1, 0.5])).fill(message, depth=0)
    return message


def random_bytes(kind: type[Message], random: Random, known: Known) -> bytes:
    """A message of `kind` as it travels; sometimes broken, cut short, or noise."""
    data = random_message(kind, random, known).SerializeToString()
    match random.randrange(12):
        case 0:
            return random.randbytes(random.choice([0, 1, 40, 5000]))
        case 1:
            return data[: random.randrange(len(data) + 1)]
        case 2 if data:
            broken = bytearray(data)
            broken[random.randrange(len(data))] ^= 1 << random.randrange(8)
            return bytes(broken)
    return data


@dataclass(frozen=True)
class _Filling:
    random: Random
    known: Known
    noise: float

    def fill(self, message: Message, depth: int) -> None:
        for field in message.DESCRIPTOR.fields:
            one_of = field.containing_oneof
            if (one_of and self.random.randrange(len(one_of.fields))) or self._noisy() or depth > 4:
                continue  # absent
            if _is_map(field):
                self._fill_map(getattr(message, field.name), field)
            elif field.is_repeated and (lists := self._known_of(field, list)):
                getattr(message, field.name).extend(self.random.choice(lists))
            elif field.is_repeated:
                for _ in range(self._length()):
                    self._add(getattr(message, field.name), field, depth)
            elif field.cpp_type == Field.CPPTYPE_MESSAGE:
                if one_of or field.name not in _OFTEN_ABSENT or self.random.random() < 0.5:
                    self._set(getattr(message, field.name), field, depth)
            else:
                setattr(message, field.name, self._value(field))

    def _noisy(self) -> bool:
        return self.random.random() < self.noise

    def _known_of(self, field: FieldDescriptor, kind: type) -> list[Any]:
        """What means something in the field. Several fields of other types may have its name."""
        if self._noisy():
            return []
        return [value for value in self.known.get(field.name, ()) if isinstance(value, kind)]

    def _length(self) -> int:
        return self.random.choice([0, 300] if self._noisy() else [1, 1, 2, 5, 11])

    def _set(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        message.SetInParent()
        if known := self._known_of(field, Message):
            message.CopyFrom(self.random.choice(known))
        else:
            self.fill(message, depth + 1)

    def _fill_map(self, values: Any, field: FieldDescriptor) -> None:
        key, value = field.message_type.fields
        for _ in range(self.random.choice([0, 0, 1, 3])):
            values[self._value(key)] = self._value(value)

    def _add(self, values: Any, field: FieldDescriptor, depth: int) -> None:
        if field.cpp_type == Field.CPPTYPE_MESSAGE:
            self.fill(values.add(), depth + 1)
        else:
            values.append(self._value(field))

    def _value(self, field: FieldDescriptor) -> Any:
        random = self.random
        wanted = bytes if field.type == Field.TYPE_BYTES else _PYTHON_TYPES.get(field.cpp_type, int)
        if known := self._known_of(field, wanted):
            return random.choice(known)
        match field.cpp_type:
            case Field.CPPTYPE_BOOL:
                return random.random() < 0.5
            case Field.CPPTYPE_ENUM:
                return random.choice([0, 1, 2, 3, 99, -1])
            case Field.CPPTYPE_DOUBLE | Field.CPPTYPE_FLOAT:
                return random.choice(_FLOATS)
            case Field.CPPTYPE_STRING if field.type == Field.TYPE_BYTES:
                return random.choice([b"", b"\x00", random.randbytes(7), random.randbytes(300)])
            case Field.CPPTYPE_STRING:
                return random.choice(["", "r", "\x00", "日本/0", "../x", "unix:/tmp/x", "[::1]:99999", _LONG])
            case kind:
                return random.choice(_BORDERS[kind])


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)
