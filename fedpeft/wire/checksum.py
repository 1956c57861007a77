"""The trailer that shows a changed byte: protobuf's own field 15, always the last five bytes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

from fedpeft.errors import UpdateError

_TAG = bytes(((15 << 3) | 5,))  # field 15, wire type 5: four bytes, little-endian
SIZE = 5


def sealed(pieces: Sequence[bytes | memoryview]) -> bytes:
    """The pieces of a message and their CRC-32 as a protobuf field; the whole is again one message."""
    crc = 0
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
    return b"".join((*pieces, _TAG, struct.pack("<I", crc)))


def check_seal(payload: bytes, who: str) -> None:
    """Refuse bytes that were changed or cut on their way.

    Raises:
        UpdateError: the last five bytes are no checksum of those before.
    """
    body, trailer = memoryview(payload)[:-SIZE], payload[-SIZE:]
    if len(trailer) < SIZE or trailer[:1] != _TAG or struct.unpack("<I", trailer[1:])[0] != zlib.crc32(body):
        raise UpdateError(
            f"{who}: {len(payload)} bytes came that are no whole update message (changed, truncated or"
            " foreign); send it again"
        )
