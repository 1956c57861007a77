"""Packed sign rows for the compiled kernels: one bit per coordinate, 64 coordinates per word.

A row over n blocks has 2n words: word b holds coordinates 0..63 of block b, word n + b coordinates 64..127.
The two halves lie apart so that the loop over blocks is plain vector code: eight blocks at a time where the
processor has 512-bit registers, four with 256 bits.
"""

import numpy as np
from numpy.typing import NDArray

from fedpeft.runtime.jit import compile_function
from fedpeft.seedspace.philox_constants import MULTIPLIERS, ROUNDS, WEYL

Words = NDArray[np.uint64]

# Typed constants: numba would turn a mix of signed and unsigned 64-bit integers into floating point.
_M0, _M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_W0, _W1 = np.uint64(WEYL[0]), np.uint64(WEYL[1])
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


@compile_function
def fill_signs(
    low: Words, high: Words, blocks: int, first: np.uint64, tail: Words, direction: np.uint64, key: np.uint64
) -> None:
    """Writes coordinates 0..63 of each block to `low`, 64..127 to `high`.

    `first` is the first block's number, `tail` the counter's words 1..3, (`direction`, `key`) the key's
    words. Multiplicands are masked, sums of high garbage are not: only the low halves are ever multiplied.
    """
    c1, c2, c3 = tail[0], tail[1], tail[2]
    for b in range(blocks):
        x0, x1, x2, x3 = first + np.uint64(b), c1, c2, c3
        k0, k1 = direction, key
        for _ in range(ROUNDS):
            p0 = _M0 * (x0 & _LOW)
            p1 = _M1 * (x2 & _LOW)
            x0 = (p1 >> _HALF) ^ x1 ^ k0
            x2 = (p0 >> _HALF) ^ x3 ^ k1
            x1 = p1 & _LOW
            x3 = p0 & _LOW
            k0 = (k0 + _W0) & _LOW
            k1 = (k1 + _W1) & _LOW
        low[b] = (x0 & _LOW) | (x1 << _HALF)
        high[b] = (x2 & _LOW) | (x3 << _HALF)
