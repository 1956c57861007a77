"""What a daemon and its worker process say: one JSON header and named byte strings, each with its length."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

_HEAD = struct.Struct("<IQ")  # length of the header, length of all that follows it


@dataclass(frozen=True)
class Frame:
    """One message between the two processes."""

    header: Mapping[str, Any]
    parts: Mapping[str, bytes] = field(default_factory=dict)


class Reader(Protocol):
    """A file that gives exactly as many bytes as asked for, or fewer at its end."""

    def read(self, size: int, /) -> bytes:
        """The next bytes."""
        ...


HEAD_BYTES = _HEAD.size


def pack(frame: Frame) -> bytes:
    """Serialise."""
    sizes = {name: len(part) for name, part in frame.parts.items()}
    header = json.dumps({"header": dict(frame.header), "parts": sizes}).encode()
    return b"".join((_HEAD.pack(len(header), sum(sizes.values())), header, *frame.parts.values()))


def sizes_of(head: bytes) -> tuple[int, int]:
    """From the first `HEAD_BYTES`: how long the header is, and all parts together."""
    header, parts = _HEAD.unpack(head)
    return header, parts


def unpack(header: bytes, body: bytes) -> Frame:
    """Inverse of `pack`, from the pieces that `sizes_of` measures."""
    table = json.loads(header)
    parts, start = {}, 0
    for name, size in table["parts"].items():
        parts[name] = body[start : start + size]
        start += size
    return Frame(table["header"], parts)


def read_frame(file: Reader) -> Frame | None:
    """The next frame; None at the end of the file."""
    head = file.read(HEAD_BYTES)
    if len(head) < HEAD_BYTES:
        return None
    header, parts = sizes_of(head)
    return unpack(file.read(header), file.read(parts))
