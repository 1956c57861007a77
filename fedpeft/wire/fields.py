"""Protobuf fields by hand: for the one that may be large, which protobuf's own reader and writer copy.

The encoding is that of the protocol buffers documentation ("Encoding"): a key (number and wire type) as a
varint, and for wire type 2 a length and so many bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

_VARINT, _EIGHT, _LENGTH, _FOUR = 0, 1, 2, 5
_LONGEST_VARINT = 10  # bytes


class MalformedError(ValueError):
    """Bytes that are no sequence of fields."""


class Field(NamedTuple):
    """A field of wire type 2 and where it lies: its key, its content, its end (offsets into the message)."""

    number: int
    key: int
    content: int
    end: int


def varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def key_of(message: Any, field: str) -> bytes:
    """The key of a length-delimited field of a message class."""
    return varint(number_of(message, field) << 3 | _LENGTH)


def number_of(message: Any, field: str) -> int:
    """A field's number by its name."""
    return int(message.DESCRIPTOR.fields_by_name[field].number)


def length_delimited(data: bytes | memoryview, start: int, end: int) -> Iterator[Field]:
    """The fields of wire type 2 in ``data[start:end]``, in order; nothing is copied.

    Raises:
        MalformedError: a key, a length or a field that doesn't end within the range.
    """
    place = start
    while place < end:
        key = place
        tag, place = read_varint(data, place, end)
        wire = tag & 7
        if wire == _LENGTH:
            length, place = read_varint(data, place, end)
            if length > end - place:
                raise MalformedError("a field is longer than its message")
            yield Field(tag >> 3, key, place, place + length)
            place += length
        elif wire == _VARINT:
            _, place = read_varint(data, place, end)
        elif wire in (_EIGHT, _FOUR):
            place += 8 if wire == _EIGHT else 4
        else:
            raise MalformedError(f"a field of wire type {wire}, which this schema doesn't use")
    if place != end:
        raise MalformedError("the last field is cut")


def read_varint(data: bytes | memoryview, place: int, end: int) -> tuple[int, int]:
    """The number that begins at `place`, and where the next thing does.

    Raises:
        MalformedError: it does not end within the range.
    """
    value = 0
    for position in range(min(_LONGEST_VARINT, end - place)):
        byte = data[place + position]
        value |= (byte & 127) << 7 * position
        if byte < 128:
            return value, place + position + 1
    raise MalformedError("a number is cut or too long")
