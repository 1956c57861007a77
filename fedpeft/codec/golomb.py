"""Positions of the non-zeros by Golomb-Rice coding of their gaps.

Source: Sattler, Wiedemann, Mueller and Samek (2019), "Sparse Binary Compression" / "Sparse Ternary
Compression", Algorithm "Golomb position encoding", which ComPEFT takes over: gap = quotient in unary (ones,
then a zero) and a remainder of b bits, with b = 1 + floor(log2(ln(phi - 1) / ln(1 - k))), phi the golden
ratio. Differences: gaps start at 0, b is clamped at 0 and travels as the first byte (so that no logarithm
decides how bytes are read), and the signs are a section of their own; the size is that of the paper to within
2 bytes.
"""

import math

import numpy as np

from fedpeft.codec.arrays import Int32Array, Uint8Array
from fedpeft.errors import UpdateError
from fedpeft.runtime.jit import compile_function

_LARGEST_PARAMETER = 31
# How many ones a byte ends in, lowest bits first.
_TRAILING_ONES = np.array([(~byte & (byte + 1)).bit_length() - 1 for byte in range(256)], dtype=np.int64)


def rice_parameter(count: int, size: int) -> int:
    """B for `count` non-zeros among `size`, 0 < count < size; 0..31."""
    # ln(phi - 1) = -ln(phi)
    ratio = -math.log((1.0 + math.sqrt(5.0)) / 2.0) / math.log1p(-count / size)
    return min(_LARGEST_PARAMETER, max(0, 1 + math.floor(math.log2(ratio))))


class GolombCoder:
    """Golomb-Rice coder as published: up to 1.9% above the entropy to densities of 50%, far above beyond."""

    def encode(self, indices: Int32Array, size: int) -> bytes:
        """Bytes for strictly ascending `indices` (int32) below `size`; none if all or no entries are."""
        count = indices.size
        if count in (0, size):
            return b""
        parameter = rice_parameter(count, size)
        bits = int(_code_bits(indices, parameter))
        packed = np.zeros(1 + (bits + 7) // 8, dtype=np.uint8)
        packed[0] = parameter
        _encode(indices, parameter, packed)
        return packed.tobytes()

    def decode(self, data: memoryview, count: int, size: int) -> Int32Array:
        """Inverse of `encode`, for `count` <= `size` entries. Raises UpdateError if `data` does not fit."""
        if count in (0, size):
            if len(data):
                raise UpdateError(
                    f"{len(data)} position bytes came where all or no entries are held: none is needed"
                )
            return np.arange(count, dtype=np.int32)
        packed = np.array(np.frombuffer(data, dtype=np.uint8))
        parameter = int(packed[0]) if packed.size else -1
        # Each gap takes its remainder and at least the closing zero.
        fits = 0 <= parameter <= _LARGEST_PARAMETER and count * (parameter + 1) <= 8 * (packed.size - 1)
        if not fits:
            raise UpdateError(
                f"{len(data)} position bytes do not fit {count} of {size} entries: truncated or corrupt"
            )
        positions = np.empty(count, dtype=np.int32)
        if not _decode(packed, parameter, size, positions):
            raise UpdateError(
                f"position bytes do not decode to {count} of {size} entries: truncated or corrupt"
            )
        return positions


@compile_function
def _code_bits(indices: Int32Array, parameter: int) -> np.int64:
    bits = np.int64(indices.size * (1 + parameter))
    previous = np.int64(-1)
    for i in range(indices.size):
        bits += (np.int64(indices[i]) - previous - 1) >> parameter
        previous = np.int64(indices[i])
    return bits


@compile_function
def _encode(indices: Int32Array, parameter: int, packed: Uint8Array) -> None:
    filled = 1
    buffer, held = np.uint64(0), np.int64(0)
    previous = np.int64(-1)
    for i in range(indices.size):
        gap = np.int64(indices[i]) - previous - 1
        previous += gap + 1
        quotient = gap >> parameter
        remainder = gap - (quotient << parameter)
        while quotient >= 16:
            # At most 7 bits are waiting, so 16 ones fit.
            buffer |= np.uint64(0xFFFF) << np.uint64(held)
            held += 16
            quotient -= 16
            while held >= 8:
                packed[filled] = np.uint8(buffer & np.uint64(255))
                filled += 1
                buffer >>= np.uint64(8)
                held -= 8
        # `quotient` ones and a zero, then the remainder: at most 7 + 16 + 31 bits.
        code = ((np.uint64(1) << np.uint64(quotient)) - np.uint64(1)) | (
            np.uint64(remainder) << np.uint64(quotient + 1)
        )
        buffer |= code << np.uint64(held)
        held += quotient + 1 + parameter
        while held >= 8:
            packed[filled] = np.uint8(buffer & np.uint64(255))
            filled += 1
            buffer >>= np.uint64(8)
            held -= 8
    if held:
        packed[filled] = np.uint8(buffer & np.uint64(255))


@compile_function
def _decode(packed: Uint8Array, parameter: int, size: int, positions: Int32Array) -> bool:
    read = 1
    buffer, held = np.uint64(0), np.int64(0)
    low_mask = (np.uint64(1) << np.uint64(parameter)) - np.uint64(1)
    position = np.int64(-1)
    for i in range(positions.size):
        quotient = np.int64(0)
        while True:
            while held <= 48 and read < packed.size:
                buffer |= np.uint64(packed[read]) << np.uint64(held)
                read += 1
                held += 8
            ones = np.int64(_TRAILING_ONES[buffer & np.uint64(255)])
            quotient += ones
            if ones < 8:
                break
            buffer >>= np.uint64(8)
            held -= 8
        # Bits beyond those that came are zero and end the unary part, so running out shows here.
        if held < ones + 1 + parameter or (quotient << parameter) >= size:
            return False
        buffer >>= np.uint64(ones + 1)
        position += 1 + (quotient << parameter) + np.int64(buffer & low_mask)
        buffer >>= np.uint64(parameter)
        held -= ones + 1 + parameter
        if position >= size:
            return False
        positions[i] = position
    return bool(read == packed.size and held < 8 and buffer == np.uint64(0))
