"""The bound that position and sign coders are measured against."""

import math


def ternary_entropy_bits(count: int, size: int) -> float:
    """Bits per entry of independent ternary symbols, `count` of `size` non-zero, both signs equally likely.

    H = -(1 - k) log2(1 - k) - k log2(k / 2) with k = count / size; 0 for an empty tensor.
    """
    if size == 0 or count == 0:
        return 0.0
    k = count / size
    zeros = 0.0 if count == size else -(1.0 - k) * math.log2(1.0 - k)
    return zeros - k * math.log2(k / 2.0)
