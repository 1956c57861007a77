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

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.runtime.jit import compile_function

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
    return head + _pack(text)


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
    result = np.zeros(num_seeds, dtype=np.int64)
    bits = np.frombuffer(body, dtype=np.uint8)
    fault, place, value = _read(bits, result, count, gap_bits, value_bits, largest)
    if fault != _SOUND:
        raise UpdateError(_line(fault, place, int(value), num_seeds, largest))
    return result


_SOUND, _ENDLESS, _CUT, _UNKNOWN_SEED, _TOO_LARGE, _MORE = range(6)


def _line(fault: int, place: int, value: int, num_seeds: int, largest: int) -> str:
    """What `_read` found, for people."""
    if fault == _ENDLESS:
        return "a scalar's code has no end within the agreed range: the stream is damaged"
    if fault == _CUT:
        return "the last scalar is cut off: the stream is truncated"
    if fault == _UNKNOWN_SEED:
        return f"seed index {place + 1 + value} is unknown: this run has K = {num_seeds}"
    if fault == _TOO_LARGE:
        return f"scalar of magnitude {1 + value}: the agreed range is {largest}"
    return f"{value} bits follow the last scalar: the stream is damaged"


@compile_function
def _bit(body: NDArray[np.uint8], place: int) -> Any:
    return (np.int64(body[place >> 3]) >> (7 - (place & 7))) & 1


@compile_function
def _take(body: NDArray[np.uint8], start: int, size: int, parameter: int, limit: int) -> tuple[int, int, Any]:
    """One code from bit `start`, expected below about `limit`: longer runs of ones aren't followed.

    Returns:
        What is wrong, the bit behind the code, and the value, which is below 2^64 for limits up to 2^62.
    """
    most = (limit >> parameter) + 1
    high = 0
    while high <= most and start + high < size and _bit(body, start + high) == 1:
        high += 1
    if high > most or start + high >= size:
        return _ENDLESS, start, np.uint64(0)
    start += high + 1
    if size - start < parameter:
        return _CUT, start, np.uint64(0)
    value = np.uint64(high)
    for place in range(start, start + parameter):
        value = (value << np.uint64(1)) | np.uint64(_bit(body, place))
    return _SOUND, start + parameter, value


@compile_function
def _read(
    body: NDArray[np.uint8],
    result: NDArray[np.int64],
    count: int,
    gap_bits: int,
    value_bits: int,
    largest: int,
) -> tuple[int, int, Any]:
    """Fill `result`; what is wrong (`_SOUND`: nothing), with the position before and the value at fault.

    Magnitudes follow all gaps, so positions are found first and marked in `result` itself.
    """
    size, start = 8 * body.size, 0
    position: Any = -1
    for _ in range(count):
        fault, start, value = _take(body, start, size, gap_bits, result.size)
        if fault != _SOUND:
            return fault, position, value
        if value >= np.uint64(result.size - 1 - position):
            return _UNKNOWN_SEED, position, value
        position += 1 + np.int64(value)
        result[position] = 1
    for position in range(result.size):
        if result[position] == 0:
            continue
        if start >= size:
            return _CUT, position, np.uint64(0)
        negative = _bit(body, start)
        fault, start, value = _take(body, start + 1, size, value_bits, largest)
        if fault != _SOUND:
            return fault, position, value
        if value >= np.uint64(largest):
            return _TOO_LARGE, position, value
        result[position] = -1 - np.int64(value) if negative else 1 + np.int64(value)
    left, damaged = size - start, size - start >= 8
    for place in range(start, size):
        damaged = damaged or _bit(body, place) == 1
    return (_MORE if damaged else _SOUND), position, np.uint64(left)


def _parameter(values: NDArray[np.int64]) -> int:
    """The Rice parameter that gives the fewest bits."""
    costs = [len(values) * (1 + bits) + sum((values >> bits).tolist()) for bits in range(MAX_PARAMETER + 1)]
    return int(np.argmin(np.array(costs, dtype=object)))


def _rice(value: int, parameter: int) -> str:
    low = format(value & ((1 << parameter) - 1), f"0{parameter}b") if parameter else ""
    return "1" * (value >> parameter) + "0" + low


def _pack(text: str) -> bytes:
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
