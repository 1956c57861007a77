"""weights +- scale z in compiled code, for whole tensors, row blocks and looked-up rows alike."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedpeft.runtime.jit import compile_function
from fedpeft.seedspace.layout import BLOCK, CounterStream
from fedpeft.seedspace.numba_signs import Words, fill_signs

TILE_BLOCKS = 64  # one kilobyte of packed signs

_ONE = np.uint64(1)

Floats = NDArray[np.float32] | NDArray[np.float64]


@compile_function
def _add_blocks(
    low: Words, high: Words, before: Floats, after: Floats, scale: np.float32 | np.float64
) -> None:
    """Writes before +- scale to after, over whole blocks; the loops of fixed length become vector code."""
    for b in range(low.shape[0]):
        word = low[b]
        source, target = before[BLOCK * b : BLOCK * b + 64], after[BLOCK * b : BLOCK * b + 64]
        for i in range(64):
            target[i] = source[i] + (scale if (word >> np.uint64(i)) & _ONE else -scale)
        word = high[b]
        source, target = before[BLOCK * b + 64 : BLOCK * b + BLOCK], after[BLOCK * b + 64 : BLOCK * b + BLOCK]
        for i in range(64):
            target[i] = source[i] + (scale if (word >> np.uint64(i)) & _ONE else -scale)


@compile_function
def _add_partly(
    low: np.uint64, high: np.uint64, offset: int, before: Floats, after: Floats,
    scale: np.float32 | np.float64,
) -> None:  # fmt: skip
    """Writes before +- scale to after, over coordinates offset, offset + 1, ... of one block."""
    for i in range(before.shape[0]):
        place = offset + i
        bit = low >> np.uint64(place) if place < 64 else high >> np.uint64(place - 64)
        after[i] = before[i] + (scale if bit & _ONE else -scale)


@compile_function
def _pieces(
    source: Floats,
    out: Floats,
    starts: NDArray[np.int64],
    tail: Words,
    direction: np.uint64,
    key: np.uint64,
    scale: np.float32 | np.float64,
) -> None:
    """out[p, i] = source[p, i] + scale * z[starts[p] + i]."""
    low = np.empty(TILE_BLOCKS, dtype=np.uint64)
    high = np.empty(TILE_BLOCKS, dtype=np.uint64)
    length = source.shape[1]
    for piece in range(starts.shape[0]):
        done = 0
        while done < length:
            before, after = source[piece, done:], out[piece, done:]
            position = starts[piece] + done
            offset = position % BLOCK
            whole = 0 if offset else min(TILE_BLOCKS, (length - done) // BLOCK)
            first = np.uint64(position // BLOCK)
            fill_signs(low, high, max(1, whole), first, tail, direction, key)
            if whole:
                step = whole * BLOCK
                _add_blocks(low[:whole], high[:whole], before[:step], after[:step], scale)
            else:
                step = min(BLOCK - offset, length - done)
                _add_partly(low[0], high[0], offset, before[:step], after[:step], scale)
            done += step


def perturb(
    stream: CounterStream,
    tensor_id: int,
    direction: int,
    source: Floats,
    starts: NDArray[np.int64],
    scale: float,
    out: Floats,
) -> None:
    """Writes source + scale * z to `out`, both float32 or float64 [pieces, length] and C-contiguous."""
    prepare(stream, tensor_id, source, starts)(direction, scale, out)


def prepare(
    stream: CounterStream, tensor_id: int, source: Floats, starts: NDArray[np.int64]
) -> Callable[[int, float, Floats], None]:
    """`perturb` with the last three arguments, direction, scale and out, still open."""
    tail = np.array(stream.counter_words(tensor_id), dtype=np.uint64)
    key, exact = np.uint64(stream.key_word), source.dtype.type

    def shift(direction: int, scale: float, out: Floats) -> None:
        _pieces(source, out, starts, tail, np.uint64(direction), key, exact(scale))

    return shift
