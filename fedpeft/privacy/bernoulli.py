"""Coins of probability exp(-gamma) that are exact, at the speed of floats.

A uniform number U in [0, 1) is drawn by its first 64 bits and compared with a float64 value of exp(-gamma).
Only when the two are closer than float arithmetic can vouch for, about once in 2**38 coins, further bits of U
are drawn and exp(-gamma) is computed from the exact gamma to as many digits as the comparison needs. So each
coin's distribution is that of real arithmetic: no rounding enters it, and none can leak.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from fedpeft.privacy.noise import NoiseSource

# Bounds the errors of both sides: 2**-53 for rounding U, less than 2**-42 for exp of a rounded gamma (2**-49
# in `discrete_gaussian`), and a few units in the last place of exp, which is at most 1.
MARGIN = 2.0**-40


def bernoulli_exp(
    source: NoiseSource, gammas: NDArray[np.float64], exact: Callable[[int], Fraction]
) -> NDArray[np.bool_]:
    """True with probability exp(-gamma), independently for each entry.

    Args:
        gammas: float64[N], at least 0, and such that exp(-gamma) is within 2**-42 of that of the exact gamma.
        exact: the exact gamma of an entry, by index.
    """
    words = source.words(len(gammas))
    gap = np.ldexp(words.astype(np.float64), -64) - np.exp(-gammas)
    result: NDArray[np.bool_] = gap < 0
    for index in np.flatnonzero(np.abs(gap) <= MARGIN):
        result[index] = settle(source, int(words[index]), exact(int(index)))
    return result


def settle(source: NoiseSource, word: int, gamma: Fraction) -> bool:
    """Whether U < exp(-gamma), U's first 64 bits being `word`; draws further bits as needed."""
    bits, precision = word, 64
    while True:
        low, high = exp_bounds(gamma, precision)
        if bits + 1 <= low:
            return True
        if bits >= high:
            return False
        bits = bits << 64 | int(source.words(1)[0])
        precision += 64


def exp_bounds(gamma: Fraction, precision: int) -> tuple[int, int]:
    """Integers that enclose ``2**precision * exp(-gamma)``, at most 3 apart, for gamma from 0 to 10**11.

    `decimal` rounds exp correctly; the digits beyond the precision absorb gamma's own rounding.
    """
    with localcontext() as context:
        context.prec = precision // 3 + 40  # a bit is 0.302 digits
        exponent = -(Decimal(gamma.numerator) / Decimal(gamma.denominator))
        value = exponent.exp() * Decimal(2) ** precision
        slack = value.scaleb(24 - context.prec)
        return math.floor(value - slack), math.ceil(value + slack) + 1
