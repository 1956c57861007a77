"""weights +- scale z in compiled code, for whole tensors, row blocks and looked-up rows alike."""

import numpy as np
from numpy.typing import NDArray

from fedpeft.seedspace.jit import compiled
from fedpeft.seedspace.layout import BLOCK, Stream
from fedpeft.seedspace.numba_signs import Words, fill_signs

TILE_BLOCKS = 32  # 4096 signed scales: 16 KB in float32, first-level cache

Floats = NDArray[np.float32] | NDArray[np.float64]


@compiled
def _expand(words: Words, target: Floats, scale: np.float32 | np.float64) -> None:
    """target[128 b + i] = +scale where bit i of word b is set, -scale elsewhere."""
    for b in range(words.shape[0]):
        word = words[b]
        part = target[BLOCK * b : BLOCK * b + 64]
        for i in range(64):
            part[i] = scale if (word >> np.uint64(i)) & np.uint64(1) else -scale


@compiled
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
    signed = np.empty(TILE_BLOCKS * BLOCK, dtype=source.dtype)
    length = source.shape[1]
    for piece in range(starts.shape[0]):
        done = 0
        while done < length:
            position = starts[piece] + done
            first = position // BLOCK
            offset = position - first * BLOCK
            blocks = min(TILE_BLOCKS, (offset + length - done + BLOCK - 1) // BLOCK)
            fill_signs(low, high, blocks, np.uint64(first), tail, direction, key)
            _expand(low[:blocks], signed, scale)
            _expand(high[:blocks], signed[64:], scale)
            step = min(blocks * BLOCK - offset, length - done)
            before = source[piece, done : done + step]
            after = out[piece, done : done + step]
            for i in range(step):
                after[i] = before[i] + signed[offset + i]
            done += step


def perturb(
    stream: Stream,
    tensor_id: int,
    direction: int,
    source: Floats,
    starts: NDArray[np.int64],
    scale: float,
    out: Floats,
) -> None:
    """Writes source + scale * z to `out`, both float32 or float64 [pieces, length] and C-contiguous."""
    tail = np.array(stream.counter_words(tensor_id), dtype=np.uint64)
    _pieces(
        source, out, starts, tail, np.uint64(direction), np.uint64(stream.key_word), source.dtype.type(scale)
    )
