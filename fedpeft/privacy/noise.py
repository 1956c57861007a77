"""Where privacy noise and secret coins come from: words of 64 random bits.

Noise that anybody can recompute protects nobody, so it never comes from a run's seed in a deployed run (nor
from torch's or NumPy's generators, whose state can be recovered from their output). `require_secure` stands
at every door where noise enters a deployed run.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import PrivacyError

Words = NDArray[np.uint64]


class NoiseSource(Protocol):
    """A stream of independent, uniform 64-bit words."""

    def words(self, count: int) -> Words:
        """The next `count` words, uint64[count]."""
        ...


@dataclass(frozen=True)
class SystemNoise:
    """The operating system's cryptographic generator; holds no state, so forks and threads are safe."""

    def words(self, count: int) -> Words:
        """Fresh words from the operating system."""
        return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)


class SeededNoise:
    """Repeatable words for simulation and tests: no privacy at all against anyone who knows the seed."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def words(self, count: int) -> Words:
        """The generator's next words."""
        return self._rng.integers(0, 2**64, size=count, dtype=np.uint64)


def require_secure(source: NoiseSource) -> SystemNoise:
    """Let only the operating system's source pass; what a deployed run calls before it starts.

    Raises:
        PrivacyError: any other type, a subclass included.
    """
    if type(source) is not SystemNoise:
        raise PrivacyError(
            f"noise from {type(source).__name__} came and this run is not a simulation; a deployed run draws"
            " its noise from the operating system (SystemNoise)"
        )
    return source


def coins(source: NoiseSource, rate: float, count: int) -> NDArray[np.bool_]:
    """Independent coins that show heads with probability `rate`, rounded down to a multiple of 2**-64.

    Poisson sampling draws its secret coins here; rounding down can only lower the chance that the accountant
    was told.

    Raises:
        PrivacyError: a rate outside [0, 1].
    """
    if not 0.0 <= rate <= 1.0:
        raise PrivacyError(f"sample rate {rate!r} came; between 0 and 1 is needed")
    words = source.words(count)
    threshold = math.floor(math.ldexp(rate, 64))  # exact: scaling by a power of two
    if threshold == 2**64:
        return np.ones(count, dtype=np.bool_)
    heads: NDArray[np.bool_] = words < np.uint64(threshold)
    return heads
