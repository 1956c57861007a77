"""<delta, z_k> in compiled code: bit planes of the integers, one population count per plane and word.

With two's complement planes D_j of the integers in a tile, sum_i delta_i b_i = sum_j weight_j |D_j & b|,
where b are the sign bits and the top plane weighs negative; then <delta, z> = 2 sum_i delta_i b_i - sum_i
delta_i. Each tile uses as many planes as its own largest magnitude needs. All of it is integer arithmetic,
so the order of tiles, threads and directions cannot show.
"""

import numpy as np
from numpy.typing import NDArray

from fedpeft.runtime.jit import compile_function
from fedpeft.seedspace.layout import BLOCK, CounterStream, Span
from fedpeft.seedspace.numba_signs import Words, fill_signs
from fedpeft.seedspace.parallel import over_ranges

TILE_BLOCKS = 128  # sixteen planes of 2 KB stay in first-level cache

_ONE, _TWO, _FOUR, _TOP = np.uint64(1), np.uint64(2), np.uint64(4), np.uint64(56)
_PAIRS, _QUADS = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333)
_BYTES, _ONES = np.uint64(0x0F0F0F0F0F0F0F0F), np.uint64(0x0101010101010101)


@compile_function
def _popcount(x: np.uint64) -> np.uint64:
    """Set bits of a word, in the form that compilers recognise and replace by the processor's instruction."""
    x = x - ((x >> _ONE) & _PAIRS)
    x = (x & _QUADS) + ((x >> _TWO) & _QUADS)
    x = (x + (x >> _FOUR)) & _BYTES
    return np.uint64((x * _ONES) >> _TOP)


@compile_function
def _pack(delta: NDArray[np.int64], blocks: int, planes: Words) -> int:
    """Writes the bit planes of one tile (row layout of `fill_signs`) and returns how many there are."""
    largest = np.int64(0)
    for value in delta:
        largest |= value if value >= 0 else ~value  # ~value = -value - 1 needs no extra bit
    depth = 1
    while largest:
        depth += 1
        largest >>= 1
    for w in range(2 * blocks):
        base = BLOCK * w if w < blocks else BLOCK * (w - blocks) + 64
        for level in range(depth):
            word = np.uint64(0)
            for i in range(64):
                word |= ((np.uint64(delta[base + i]) >> np.uint64(level)) & _ONE) << np.uint64(i)
            planes[level, w] = word
    return depth


@compile_function
def _count(row: Words, planes: Words, depth: int, words: int) -> np.int64:
    """sum_j weight_j |D_j & row|; four planes per pass share one load of the row."""
    result = np.int64(0)
    top = depth - 1
    level = 0
    while level + 4 <= top:
        p0, p1, p2, p3 = planes[level], planes[level + 1], planes[level + 2], planes[level + 3]
        n0, n1, n2, n3 = np.uint64(0), np.uint64(0), np.uint64(0), np.uint64(0)
        for w in range(words):
            bits = row[w]
            n0 += _popcount(p0[w] & bits)
            n1 += _popcount(p1[w] & bits)
            n2 += _popcount(p2[w] & bits)
            n3 += _popcount(p3[w] & bits)
        result += np.int64(n0 + (n1 << _ONE) + (n2 << _TWO) + (n3 << np.uint64(3))) << level
        level += 4
    while level <= top:
        plane = planes[level]
        n0 = np.uint64(0)
        for w in range(words):
            n0 += _popcount(plane[w] & row[w])
        weighted = np.int64(n0) << level
        result += weighted if level < top else -weighted
        level += 1
    return result


@compile_function
def _tiles(
    delta: NDArray[np.int64],
    first_tile: int,
    last_tile: int,
    first_block: int,
    tail: Words,
    key: np.uint64,
    directions: Words,
) -> NDArray[np.int64]:
    """Dot products of the tiles [first_tile, last_tile) with every direction."""
    result = np.zeros(directions.shape[0], dtype=np.int64)
    row = np.empty(2 * TILE_BLOCKS, dtype=np.uint64)
    planes = np.empty((64, 2 * TILE_BLOCKS), dtype=np.uint64)
    all_blocks = delta.shape[0] // BLOCK
    for tile in range(first_tile, last_tile):
        begin = tile * TILE_BLOCKS
        blocks = min(TILE_BLOCKS, all_blocks - begin)
        part = delta[begin * BLOCK : (begin + blocks) * BLOCK]
        depth = _pack(part, blocks, planes)
        plain = part.sum()
        for k in range(directions.shape[0]):
            fill_signs(
                row[:blocks], row[blocks:], blocks, np.uint64(first_block + begin), tail, directions[k], key
            )
            result[k] += 2 * _count(row, planes, depth, 2 * blocks) - plain
    return result


def project(
    stream: CounterStream, span: Span, directions: NDArray[np.int64], delta: NDArray[np.int64], threads: int
) -> NDArray[np.int64]:
    """int64 [K]: <delta, z_k> over the span; the caller has checked the bound."""
    if not span.size:
        return np.zeros(len(directions), dtype=np.int64)
    padded = np.zeros(span.num_blocks * BLOCK, dtype=np.int64)
    padded[span.offset : span.offset + span.size] = delta
    tail = np.array(stream.counter_words(span.tensor_id), dtype=np.uint64)
    which, key = directions.astype(np.uint64), np.uint64(stream.key_word)

    def work(first: int, last: int) -> NDArray[np.int64]:
        return _tiles(padded, first, last, span.first_block, tail, key, which)

    parts = over_ranges(work, -(-span.num_blocks // TILE_BLOCKS), threads)
    result: NDArray[np.int64] = np.sum(parts, axis=0, dtype=np.int64)
    return result
