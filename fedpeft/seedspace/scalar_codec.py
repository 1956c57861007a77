"""Sparse integer amounts as few bytes: Rice-coded gaps between visited seeds, then Rice-coded integers.

Layout: format byte, K and the number n of non-zero amounts as varints, the two Rice parameters as bytes,
then one bit string, padded with zeros to whole bytes: n gaps (position - previous position - 1), then n
times a sign bit and |amount| - 1. A Rice code with parameter b writes v as v >> b ones, a zero, and the b
low bits of v. The encoder takes the parameters that give the fewest bits; geometric gaps and the two-sided,
single-peaked scalars of a run then cost within a few per cent of their entropy.

Source: Golomb, "Run-length encodings" (1966); Rice and Plaunt (1971). We differ in nothing but the framing.
Nothing that the stream says is believed: every count is checked against what the receiver knows before it
is used.
"""

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError

FORMAT = 0x51
MAX_PARAMETER = 62


def encode_amounts(amounts: NDArray[np.int64]) -> bytes:
    """Bytes for int64 [K] amounts; zeros cost next to nothing.

    Raises: UpdateError for another dtype or shape, or magnitudes of 2^62 and more.
    """
    if amounts.dtype != np.int64 or amounts.ndim != 1:
        raise UpdateError(f"amounts are {amounts.dtype} of shape {amounts.shape}: need int64 [K]")
    positions = np.flatnonzero(amounts)
    values = amounts[positions]
    if len(values) and not -(2**62) < values.min() <= values.max() < 2**62:
        raise UpdateError("amounts reach 2^62: they can't be sent")
    gaps = np.diff(positions, prepend=-1) - 1
    magnitudes = np.abs(values) - 1
    gap_bits, value_bits = _parameter(gaps), _parameter(magnitudes)
    text = "".join(_rice(gap, gap_bits) for gap in gaps.tolist()) + "".join(
        ("1" if value < 0 else "0") + _rice(abs(value) - 1, value_bits) for value in values.tolist()
    )
    head = bytes([FORMAT]) + _varint(len(amounts)) + _varint(len(values)) + bytes([gap_bits, value_bits])
    return head + _packed(text)


def decode_amounts(payload: bytes, num_seeds: int, largest: int) -> NDArray[np.int64]:
    """int64 [num_seeds] from `encode_amounts`' bytes, for the K and the largest magnitude agreed in the run.

    Raises: UpdateError for a truncated or padded stream, another K, a seed out of range, or a scalar beyond
    `largest`.
    """
    if not payload or payload[0] != FORMAT:
        raise UpdateError(f"scalars don't begin with byte {FORMAT:#x}: the sender speaks another version")
    claimed, offset = _read_varint(payload, 1)
    if claimed != num_seeds:
        raise UpdateError(f"scalars are for K = {claimed}: this run has K = {num_seeds}")
    count, offset = _read_varint(payload, offset)
    if count > num_seeds:
        raise UpdateError(f"{count} scalars for K = {num_seeds} seeds: send each seed once")
    if len(payload) < offset + 2:
        raise UpdateError(f"scalars are truncated after {len(payload)} bytes: send them again")
    gap_bits, value_bits = payload[offset], payload[offset + 1]
    body = payload[offset + 2 :]
    if max(gap_bits, value_bits) > MAX_PARAMETER or count * (gap_bits + value_bits + 3) > 8 * len(body):
        raise UpdateError(f"{count} scalars can't be within {len(body)} bytes: the stream is truncated")
    return _Reader(body).amounts(num_seeds, count, gap_bits, value_bits, largest)


class _Reader:
    """Takes Rice codes off a bit string, refusing to read past its end."""

    def __init__(self, body: bytes) -> None:
        # A leading one keeps the zeros that a number would lose.
        self.text = bin(int.from_bytes(b"\1" + body, "big"))[3:]
        self.place = 0

    def amounts(
        self, num_seeds: int, count: int, gap_bits: int, value_bits: int, largest: int
    ) -> NDArray[np.int64]:
        """The decoded vector; afterwards nothing but padding may be left."""
        result = np.zeros(num_seeds, dtype=np.int64)
        positions, position = [], -1
        for _ in range(count):
            position += 1 + self.rice(gap_bits, num_seeds)
            if position >= num_seeds:
                raise UpdateError(f"seed index {position} is unknown: this run has K = {num_seeds}")
            positions.append(position)
        for position in positions:
            sign = -1 if self.bits(1) else 1
            magnitude = 1 + self.rice(value_bits, largest)
            if magnitude > largest:
                raise UpdateError(f"scalar of magnitude {magnitude}: the agreed range is {largest}")
            result[position] = sign * magnitude
        rest = self.text[self.place :]
        if len(rest) >= 8 or "1" in rest:
            raise UpdateError(f"{len(rest)} bits follow the last scalar: the stream is damaged")
        return result

    def rice(self, parameter: int, limit: int) -> int:
        """One code, expected below about `limit`: longer runs of ones aren't followed."""
        end = self.text.find("0", self.place, self.place + (limit >> parameter) + 2)
        if end < 0:
            raise UpdateError("a scalar's code has no end within the agreed range: the stream is damaged")
        high = end - self.place
        self.place = end + 1
        return high << parameter | self.bits(parameter)

    def bits(self, count: int) -> int:
        """The next bits as an unsigned number."""
        part = self.text[self.place : self.place + count]
        if len(part) < count:
            raise UpdateError("the last scalar is cut off: the stream is truncated")
        self.place += count
        return int(part, 2) if part else 0


def _parameter(values: NDArray[np.int64]) -> int:
    """The Rice parameter that gives the fewest bits."""
    costs = [len(values) * (1 + bits) + sum((values >> bits).tolist()) for bits in range(MAX_PARAMETER + 1)]
    return int(np.argmin(np.array(costs, dtype=object)))


def _rice(value: int, parameter: int) -> str:
    low = format(value & ((1 << parameter) - 1), f"0{parameter}b") if parameter else ""
    return "1" * (value >> parameter) + "0" + low


def _packed(text: str) -> bytes:
    padded = text + "0" * (-len(text) % 8)
    return int(padded, 2).to_bytes(len(padded) // 8, "big") if padded else b""


def _varint(value: int) -> bytes:
    """Base 128, low digits first, the top bit set on all but the last."""
    digits = bytearray()
    while value >= 128:
        digits.append(value % 128 + 128)
        value //= 128
    return bytes([*digits, value])


def _read_varint(payload: bytes, offset: int) -> tuple[int, int]:
    """The number and the offset behind it; at most five digits."""
    value = 0
    for digit in range(5):
        if offset + digit >= len(payload):
            raise UpdateError(f"scalars are truncated after {len(payload)} bytes: send them again")
        byte = payload[offset + digit]
        value |= (byte & 127) << (7 * digit)
        if byte < 128:
            return value, offset + digit + 1
    raise UpdateError("a count in the scalars' head has no end: the stream is damaged")
