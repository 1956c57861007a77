"""sum_k A_k z_k in compiled code: bit-sliced carry-save addition over tiles that stay in cache."""

import numpy as np
from numpy.typing import NDArray

from fedpeft.runtime.jit import compile_function
from fedpeft.seedspace.layout import BLOCK, CounterStream, Span
from fedpeft.seedspace.numba_signs import Words, fill_signs
from fedpeft.seedspace.parallel import over_ranges
from fedpeft.seedspace.schedule import DIRECTIONS_PER_CHUNK, Schedule, schedule_of

TILE_BLOCKS = (
    128  # rows of 2 KB: a chunk of directions and its carries stay within 512 KB of second-level cache
)

# Byte b of entry v is bit b of v: eight coordinates' bits, one per byte.
_SPREAD = np.array(
    [sum(((value >> bit) & 1) << (8 * bit) for bit in range(8)) for value in range(256)], dtype=np.uint64
)
_DIRECTIONS = DIRECTIONS_PER_CHUNK


@compile_function
def _add_eight(rows: Words, planes: Words, addition: NDArray[np.int32], words: int) -> None:
    """One carry-save addition: eight rows into three planes and a carry row; seven full adders per word."""
    a, b, c, d = rows[addition[0]], rows[addition[1]], rows[addition[2]], rows[addition[3]]
    e, f, g, h = rows[addition[4]], rows[addition[5]], rows[addition[6]], rows[addition[7]]
    column = addition[8]
    plane1, plane2, plane4 = planes[column], planes[column + 1], planes[column + 2]
    carry = rows[addition[9]]
    for w in range(words):
        ones, twos, fours = plane1[w], plane2[w], plane4[w]
        half = ones ^ a[w]
        twos_a = (ones & a[w]) | (half & b[w])
        ones = half ^ b[w]
        half = ones ^ c[w]
        twos_b = (ones & c[w]) | (half & d[w])
        ones = half ^ d[w]
        half = twos ^ twos_a
        fours_a = (twos & twos_a) | (half & twos_b)
        twos = half ^ twos_b
        half = ones ^ e[w]
        twos_a = (ones & e[w]) | (half & f[w])
        ones = half ^ f[w]
        half = ones ^ g[w]
        twos_b = (ones & g[w]) | (half & h[w])
        ones = half ^ h[w]
        half = twos ^ twos_a
        fours_b = (twos & twos_a) | (half & twos_b)
        twos = half ^ twos_b
        half = fours ^ fours_a
        carry[w] = (fours & fours_a) | (half & fours_b)
        plane4[w] = half ^ fours_b
        plane2[w] = twos
        plane1[w] = ones


@compile_function
def _unpack(
    planes: Words, depth: int, blocks: int, total: int, packed: Words, spread: Words, out: NDArray[np.int64]
) -> None:
    """out[i] = 2 * (the number whose bits lie across the planes at coordinate i) - total.

    Eight planes become one byte per coordinate through the table, then bytes are joined.
    """
    words = 2 * blocks
    groups = (depth + 7) // 8
    for group in range(groups):
        target = packed[group]
        for w in range(words):
            for byte in range(8):
                merged = np.uint64(0)
                for level in range(8 * group, min(depth, 8 * group + 8)):
                    bits = (planes[level, w] >> np.uint64(8 * byte)) & np.uint64(255)
                    merged |= spread[bits] << np.uint64(level - 8 * group)
                target[8 * w + byte] = merged
    octets = packed.view(np.uint8)
    for w in range(words):
        # Words of the second half hold coordinates 64..127 of their block.
        base = BLOCK * w if w < blocks else BLOCK * (w - blocks) + 64
        for i in range(64):
            out[base + i] = -total
        for group in range(groups):
            for i in range(64):
                out[base + i] += np.int64(octets[group, 64 * w + i]) << (8 * group + 1)


@compile_function
def _tiles(
    out: NDArray[np.int64],
    first_tile: int,
    last_tile: int,
    first_block: int,
    tail: Words,
    key: np.uint64,
    directions: Words,
    flips: Words,
    additions: NDArray[np.int32],
    edges: NDArray[np.int64],
    num_rows: int,
    depth: int,
    total: int,
    spread: Words,
) -> None:
    """Sums for the tiles [first_tile, last_tile) of `out`, which begins at block `first_block`."""
    rows = np.zeros((num_rows, 2 * TILE_BLOCKS), dtype=np.uint64)
    planes = np.zeros((depth + 2, 2 * TILE_BLOCKS), dtype=np.uint64)
    packed = np.zeros(((depth + 7) // 8, 16 * TILE_BLOCKS), dtype=np.uint64)
    all_blocks = out.shape[0] // BLOCK
    for tile in range(first_tile, last_tile):
        begin = tile * TILE_BLOCKS
        blocks = min(TILE_BLOCKS, all_blocks - begin)
        planes[:, :] = np.uint64(0)
        for chunk in range(edges.shape[0] - 1):
            start = chunk * _DIRECTIONS
            for r in range(min(_DIRECTIONS, directions.shape[0] - start)):
                row = rows[r]
                fill_signs(
                    row[:blocks], row[blocks:], blocks, np.uint64(first_block + begin), tail,
                    directions[start + r], key,
                )  # fmt: skip
                flip = flips[start + r]
                for w in range(2 * blocks):
                    row[w] ^= flip
            for addition in range(edges[chunk], edges[chunk + 1]):
                _add_eight(rows, planes, additions[addition], 2 * blocks)
        _unpack(planes, depth, blocks, total, packed, spread, out[begin * BLOCK : (begin + blocks) * BLOCK])


def accumulate(
    stream: CounterStream, span: Span, directions: NDArray[np.int64], amounts: NDArray[np.int64], threads: int
) -> NDArray[np.int64]:
    """int64 [span.size]: sum_k amounts[k] * z_k over the span; the caller has checked the bound."""
    plan: Schedule = schedule_of(directions.tobytes(), amounts.tobytes())
    if not plan.total or not span.size:
        return np.zeros(span.size, dtype=np.int64)
    out = np.empty(span.num_blocks * BLOCK, dtype=np.int64)
    tail = np.array(stream.counter_words(span.tensor_id), dtype=np.uint64)

    def work(first: int, last: int) -> None:
        _tiles(
            out, first, last, span.first_block, tail, np.uint64(stream.key_word), plan.directions, plan.flips,
            plan.additions, plan.edges, plan.rows, plan.planes, plan.total, _SPREAD,
        )  # fmt: skip

    over_ranges(work, -(-span.num_blocks // TILE_BLOCKS), threads)
    return out[span.offset : span.offset + span.size]
