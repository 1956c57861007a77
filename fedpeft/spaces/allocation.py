"""How many coefficients each block gets, when blocks that move further get more: integers throughout.

A replica that replays all rounds must come to the same numbers, so nothing here is a float.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

FEWEST = 2  # coefficients of a block


def count_shared(total: int, norms: Sequence[int]) -> list[int]:
    """Return how many of `total` coefficients each block gets: `FEWEST`, and more in proportion to norms.

    What the division leaves over goes to the blocks with the largest remainders, earlier ones first.

    Args:
        total: at least `FEWEST` for each block.
        norms: not negative, at least one positive.

    Source: Shu et al. 2025, Ferret: coefficients of a block in proportion to its norm.
    """
    rest, whole = total - FEWEST * len(norms), sum(norms)
    counts = [FEWEST + rest * norm // whole for norm in norms]
    by_remainder = sorted(range(len(norms)), key=lambda index: -(rest * norms[index] % whole))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def squared_norm(coefficients: Sequence[int]) -> int:
    """Return what K coefficients on sign directions say of the squared norm of their block's change.

    A coefficient is <s, x> / K and the mean of <s, x>^2 over signs s is |x|^2: K times the sum of squares.
    """
    return len(coefficients) * sum(value * value for value in coefficients)


def whole_root(square: int) -> int:
    """Return the square root of an integer, rounded down."""
    return math.isqrt(square)
