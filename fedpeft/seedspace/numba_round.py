"""theta_0 + quantum * S on the CPU in one pass, where float64 holds the sum exactly."""

import numpy as np
from numpy.typing import NDArray

from fedpeft.runtime.jit import compile_function


@compile_function
def add_exactly(
    base: NDArray[np.float32], sums: NDArray[np.int64], quantum: float, out: NDArray[np.float32]
) -> int:
    """Writes the rounded sums and returns how many were not exact before the last rounding.

    Only when that is zero has every weight been rounded once; `rounding` then needs no second look. TwoSum
    (Knuth) gives the error of the float64 sum.
    """
    inexact = 0
    for i in range(base.shape[0]):
        weight, step = np.float64(base[i]), np.float64(sums[i]) * quantum
        total = weight + step
        shadow = total - weight
        error = (weight - (total - shadow)) + (step - shadow)
        inexact += error != 0.0
        out[i] = np.float32(total)
    return inexact


@compile_function
def add_to_odd(
    base: NDArray[np.float32], sums: NDArray[np.int64], quantum: float, out: NDArray[np.float32]
) -> int:
    """As `add_exactly`, but rounds to odd in float32, for weights that are then rounded to 16 bits.

    See `rounding` for the why and the how of a last bit set where a sum isn't exact.
    """
    inexact = 0
    bits = out.view(np.int32)
    for i in range(base.shape[0]):
        weight, step = np.float64(base[i]), np.float64(sums[i]) * quantum
        total = weight + step
        shadow = total - weight
        error = (weight - (total - shadow)) + (step - shadow)
        inexact += error != 0.0
        short = np.float32(total)
        out[i] = short
        rest = total - np.float64(short)
        if rest != 0.0 and not bits[i] & 1:
            outwards = (rest > 0.0) == (short > 0.0) or short == 0.0
            bits[i] += 1 if outwards else -1
    return inexact
