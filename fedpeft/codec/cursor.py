"""Bounded reading of little-endian fields: nothing is allocated before the bytes for it have come."""

import struct

import numpy as np

from fedpeft.codec.arrays import Float32Array
from fedpeft.errors import UpdateError

_VARINT_BYTES = 9


def varint(value: int) -> bytes:
    """Unsigned LEB128 of 0 <= value < 2^63: seven bits per byte, lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Cursor:
    """Reads a buffer from front to back; every method raises UpdateError when the bytes run out."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> memoryview:
        """The next `count` bytes, without copying."""
        left = len(self._data) - self._at
        if not 0 <= count <= left:
            raise UpdateError(
                f"coded tensor: {count} bytes are declared and {left} are left: truncated or corrupt"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def rest(self) -> memoryview:
        """All bytes that are left, possibly none."""
        return self.take(len(self._data) - self._at)

    def byte(self) -> int:
        """One byte, 0..255."""
        return self.take(1)[0]

    def varint(self) -> int:
        """Unsigned LEB128 below 2^63, in its shortest form."""
        value = 0
        for place in range(_VARINT_BYTES):
            byte = self.byte()
            value |= (byte & 0x7F) << (7 * place)
            if byte < 0x80:
                if place and byte == 0:
                    break
                return value
        raise UpdateError("coded tensor: a length is not in its shortest form: corrupt")

    def read_unsigned(self, width: int) -> int:
        """A fixed-width unsigned integer of `width` bytes."""
        return int.from_bytes(self.take(width), "little")

    def float32(self) -> float:
        """One float32, exact as a Python float."""
        (value,) = struct.unpack("<f", self.take(4))
        return float(value)

    def floats(self, count: int) -> Float32Array:
        """`count` float32 values as a new vector."""
        return np.frombuffer(self.take(4 * count), dtype="<f4").astype(np.float32)

    def finish(self) -> None:
        """Refuses bytes that nobody read."""
        left = len(self._data) - self._at
        if left:
            raise UpdateError(f"coded tensor: {left} bytes follow its end: corrupt")
