"""Positions of the non-zeros, coded by an asymmetric numeral system over their gaps.

Source: Duda (2013), "Asymmetric numeral systems", the range variant; interleaving after Giesen (2014),
"Interleaved entropy coders". Gaps of independent positions are geometric. A gap is split into chunks of
2^shift entries: the remainder travels as plain bits (it is almost uniform, since a chunk holds 0.15 non-zeros
at most), the number of whole chunks as symbols. The last symbol means "that many chunks, and go on", which
loses nothing: what is left of a geometric gap is geometric again.

Every quantity that the decoder needs is computed in integers from the tensor's size and its count of
non-zeros, so decoding gives the same positions on every machine, and no table travels.

Layout: remainders (`shift` bits each, lowest first, padded with zero bits), 1 or 4 final states (uint32),
then 16-bit words; all little-endian. Nothing follows the last word.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedpeft.codec.arrays import Int32Array, Uint8Array
from fedpeft.errors import UpdateError
from fedpeft.runtime.jit import compile_function

_PRECISION = 12
_TOTAL = 1 << _PRECISION
# States live in [2^16, 2^32) and move 16 bits at a time.
_LOWEST_STATE = 1 << 16
_LANES = 4
# Below this many non-zeros the bytes of more states weigh more than the time they save.
_MIN_COUNT_FOR_LANES = 4096
_FIXED_POINT = 32

Uint16Array = npt.NDArray[np.uint16]
Uint32Array = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class GapModel:
    """`starts[s]`..`starts[s + 1]` is the range of symbol s among 4096; `escape` is the last symbol."""

    shift: int
    starts: tuple[int, ...]

    @property
    def escape(self) -> int:
        """The symbol that stands for `escape` whole chunks and more to come."""
        return len(self.starts) - 2


def gap_model(count: int, size: int) -> GapModel:
    """The integer model for `count` non-zeros among `size`, 0 < count < size.

    Cumulative counts are 4096 (1 - rho^s), rounded, where rho is the chance that a chunk is empty, in 32-bit
    fixed point: each step is an exact integer product and a floor.
    """
    shift = 0
    while 20 * (count << (shift + 1)) <= 3 * size:
        shift += 1
    rho = ((size - count) << _FIXED_POINT) // size
    for _ in range(shift):
        rho = rho * rho >> _FIXED_POINT
    starts, survival = [0], 1 << _FIXED_POINT
    while True:
        survival = survival * rho >> _FIXED_POINT
        tail = (survival + (1 << (_FIXED_POINT - _PRECISION - 1))) >> (_FIXED_POINT - _PRECISION)
        following = _TOTAL - max(1, tail)
        if following <= starts[-1]:
            break
        starts.append(following)
    return GapModel(shift, (*starts, _TOTAL))


class RansCoder:
    """Position coder within a fraction of a percent of the entropy at every density; the default."""

    def encode(self, indices: Int32Array, size: int) -> bytes:
        """Bytes for strictly ascending `indices` (int32) below `size`; none if all or no entries are."""
        count = indices.size
        if count in (0, size):
            return b""
        model = gap_model(count, size)
        symbols = np.empty(count + (size >> model.shift) // model.escape + 1, dtype=np.uint8)
        remainders = np.zeros(_remainder_bytes(count, model.shift), dtype=np.uint8)
        used = _split(indices, model.shift, model.escape, symbols, remainders)
        states = np.full(_lanes(count), _LOWEST_STATE, dtype=np.uint32)
        words = np.empty(used + 1, dtype=np.uint16)
        first = _encode(symbols[:used], np.array(model.starts, dtype=np.uint32), states, words)
        return remainders.tobytes() + states.astype("<u4").tobytes() + words[first:].astype("<u2").tobytes()

    def decode(self, data: memoryview, count: int, size: int) -> Int32Array:
        """Inverse of `encode`, for `count` <= `size` entries. Raises UpdateError if `data` does not fit."""
        if count in (0, size):
            if len(data):
                raise UpdateError(
                    f"{len(data)} position bytes came where all or no entries are held: none is needed"
                )
            return np.arange(count, dtype=np.int32)
        model = gap_model(count, size)
        low_bytes, lanes = _remainder_bytes(count, model.shift), _lanes(count)
        body = len(data) - low_bytes - 4 * lanes
        if body < 0 or body % 2:
            raise UpdateError(
                f"{len(data)} position bytes do not fit {count} of {size} entries: truncated or corrupt"
            )
        # Copies: the kernels are compiled for aligned, writable arrays only.
        remainders = np.array(np.frombuffer(data, dtype=np.uint8, count=low_bytes))
        states = np.array(np.frombuffer(data, dtype="<u4", count=lanes, offset=low_bytes), dtype=np.uint32)
        words = np.zeros(body // 2 + 1, dtype=np.uint16)
        words[:-1] = np.frombuffer(data, dtype="<u2", offset=low_bytes + 4 * lanes)
        slots = _slot_table(model)
        positions = np.empty(count, dtype=np.int32)
        whole = _decode(words, states, slots, model.escape, remainders, model.shift, size, positions)
        if not whole or _loose_bits(remainders, count * model.shift):
            raise UpdateError(
                f"position bytes do not decode to {count} of {size} entries: truncated or corrupt"
            )
        return positions


def _slot_table(model: GapModel) -> Uint32Array:
    """Per slot: width of its symbol's range, offset inside it, symbol (12, 12 and 8 bits)."""
    starts = np.array(model.starts, dtype=np.uint32)
    widths = np.diff(starts)
    offsets = np.arange(_TOTAL, dtype=np.uint32) - np.repeat(starts[:-1], widths)
    symbols = np.repeat(np.arange(widths.size, dtype=np.uint32), widths)
    return np.repeat(widths, widths) << np.uint32(20) | offsets << np.uint32(8) | symbols


def _lanes(count: int) -> int:
    return _LANES if count >= _MIN_COUNT_FOR_LANES else 1


def _remainder_bytes(count: int, shift: int) -> int:
    return (count * shift + 7) // 8


def _loose_bits(packed: Uint8Array, bits: int) -> bool:
    return bool(bits % 8) and int(packed[-1]) >> (bits % 8) != 0


@compile_function
def _split(indices: Int32Array, shift: int, escape: int, symbols: Uint8Array, remainders: Uint8Array) -> int:
    used, filled = 0, 0
    buffer, held = np.uint64(0), 0
    previous = np.int64(-1)
    for i in range(indices.size):
        gap = np.int64(indices[i]) - previous - 1
        previous += gap + 1
        chunks = gap >> shift
        buffer |= np.uint64(gap - (chunks << shift)) << np.uint64(held)
        held += shift
        while held >= 8:
            remainders[filled] = np.uint8(buffer & np.uint64(255))
            filled += 1
            buffer >>= np.uint64(8)
            held -= 8
        while chunks >= escape:
            symbols[used] = escape
            used += 1
            chunks -= escape
        symbols[used] = chunks
        used += 1
    if held:
        remainders[filled] = np.uint8(buffer & np.uint64(255))
    return used


@compile_function
def _encode(symbols: Uint8Array, starts: Uint32Array, states: Uint32Array, words: Uint16Array) -> int:
    first = words.size
    lane_mask = states.size - 1
    # Backwards: the decoder is a stack machine and reads forwards.
    for i in range(symbols.size - 1, -1, -1):
        lane = i & lane_mask
        start = np.uint32(starts[symbols[i]])
        width = np.uint32(starts[symbols[i] + 1] - start)
        state = np.uint32(states[lane])
        # Written always, kept if needed: no branch to mispredict. `words` has one spare in front.
        words[first - 1] = np.uint16(state & np.uint32(0xFFFF))
        full = state >= np.uint32(width << np.uint32(20))
        first -= int(full)
        state = np.uint32(state >> np.uint32(16)) if full else state
        whole = np.uint32(state // width)
        states[lane] = np.uint32((whole << np.uint32(12)) + (state - whole * width) + start)
    return first


@compile_function
def _decode(
    words: Uint16Array,
    states: Uint32Array,
    slots: Uint32Array,
    escape: int,
    remainders: Uint8Array,
    shift: int,
    size: int,
    positions: Int32Array,
) -> bool:
    # The four states turn like a ring, so that they stay in registers.
    interleaved = states.size == _LANES
    first, second = np.uint64(states[0]), np.uint64(states[1 % states.size])
    third, fourth = np.uint64(states[2 % states.size]), np.uint64(states[3 % states.size])
    taken, read = 0, 0
    buffer, held = np.uint64(0), 0
    low_mask = (np.uint64(1) << np.uint64(shift)) - np.uint64(1)
    position = np.int64(-1)
    for i in range(positions.size):
        chunks = np.int64(0)
        while True:
            state = first
            slot = slots[state & np.uint32(4095)]
            symbol = np.int64(slot & np.uint32(0xFF))
            state = (slot >> np.uint32(20)) * (state >> np.uint32(12)) + (
                (slot >> np.uint32(8)) & np.uint32(4095)
            )
            # Loaded always, used if needed: no branch to mispredict. `words` ends in one spare.
            word = words[taken]
            low = state < 65536
            state = (state << np.uint32(16) | word) if low else state
            taken += int(low)
            if taken == words.size:
                return False
            if interleaved:
                first, second, third, fourth = second, third, fourth, state
            else:
                first = state
            chunks += symbol
            if symbol != escape:
                break
            if (chunks << shift) >= size:
                return False
        while held < shift:
            buffer |= np.uint64(remainders[read]) << np.uint64(held)
            read += 1
            held += 8
        position += 1 + (chunks << shift) + np.int64(buffer & low_mask)
        buffer >>= np.uint64(shift)
        held -= shift
        if position >= size:
            return False
        positions[i] = position
    if taken != words.size - 1:
        return False
    # Encoding starts from the lowest state, so honest bytes end there.
    return first == 65536 and (not interleaved or (second == 65536 and third == 65536 and fourth == 65536))
