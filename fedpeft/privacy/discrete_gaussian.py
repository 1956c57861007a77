"""The discrete Gaussian on the integers, sampled exactly and by the million.

P(x) is proportional to exp(-x^2 / 2 sigma^2) for whole x. Floats added to floats leak through their last bits
(Mironov 2012); integers added to an exact integer sum have no such bits, and the accountant is exact for
them.

Source: Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy", algorithms 2 and 3.
We differ in that the Laplace scale is the power of two nearest sigma, so that uniform integers are masked
bits (any scale gives the same distribution, this one is accepted 65-76% of the time), and that coins are
settled from floats wherever those decide (`fedpeft.privacy.bernoulli`). The number of rejected candidates,
hence the time, depends on the noise; who can time the sampler to the microsecond learns something about it.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import PrivacyError
from fedpeft.privacy.bernoulli import bernoulli_exp
from fedpeft.privacy.noise import NoiseSource

Integers = NDArray[np.int64]

MIN_STD = 2.0**-6  # less than this is no noise on whole numbers
MAX_STD = 2.0**52  # candidates up to 512 scales stay within int64, and uniform parts are exact in float64
BLOCK = 1 << 16  # candidates per pass: a few arrays of 512 KiB


def discrete_gaussian(source: NoiseSource, std: float, size: int) -> Integers:
    """`size` independent discrete Gaussians, int64[size].

    Args:
        std: sigma in steps of the integer grid, taken as exactly this float. For sigma above 1 it is the
            standard deviation to many digits.

    Raises:
        PrivacyError: a sigma outside `MIN_STD` to `MAX_STD`.
    """
    if not MIN_STD <= std <= MAX_STD:
        raise PrivacyError(
            f"noise of {std!r} quanta came; 2^-6 to 2^52 is needed: choose a quantum well below the noise"
        )
    out = np.empty(size, dtype=np.int64)
    filled = 0
    while filled < size:
        found = _accept(source, std, min(BLOCK, 2 * (size - filled) + 16))
        taken = min(len(found), size - filled)
        out[filled : filled + taken] = found[:taken]
        filled += taken
    return out


def _accept(source: NoiseSource, std: float, candidates: int) -> Integers:
    """Those of some Laplace candidates that a Gaussian accepts (algorithm 3)."""
    scale = 1 << max(0, round(math.log2(std)))
    drawn = _discrete_laplace(source, scale, candidates)
    # gamma = (|y| - sigma^2/t)^2 / 2 sigma^2; |y|/sigma and sigma/t are right to 2 units in the last place
    offset = np.abs(drawn) / std - std / scale

    def gamma(index: int) -> Fraction:
        variance = Fraction(std) ** 2
        return (abs(int(drawn[index])) - variance / scale) ** 2 / (2 * variance)

    return drawn[bernoulli_exp(source, 0.5 * offset * offset, gamma)]


def _discrete_laplace(source: NoiseSource, scale: int, candidates: int) -> Integers:
    """Discrete Laplace, P(y) proportional to exp(-|y| / scale), for a power of two `scale` (algorithm 2).

    Returns:
        int64, about 0.63 times `candidates` of them.
    """
    words = source.words(candidates)
    uniform = (words & np.uint64(scale - 1)).astype(np.int64)
    negative = words >> np.uint64(63) == 1  # a bit that the mask leaves out
    kept = bernoulli_exp(source, uniform / float(scale), lambda index: Fraction(int(uniform[index]), scale))
    uniform, negative = uniform[kept], negative[kept]
    size = uniform + scale * _geometric(source, len(uniform))
    once = ~(negative & (size == 0))  # zero has one sign
    drawn: Integers = np.where(negative, -size, size)[once]
    return drawn


def _geometric(source: NoiseSource, count: int) -> Integers:
    """How often a coin of probability 1/e shows heads before its first tails, int64[count]."""
    heads = np.zeros(count, dtype=np.int64)
    alive = np.arange(count)
    while alive.size:
        alive = alive[bernoulli_exp(source, np.ones(alive.size), lambda _: Fraction(1))]
        heads[alive] += 1
    return heads
