"""Public random positions: both sides compute them from a seed, so only values travel.

Source: counter-based generation after Salmon, Moraes, Dror and Shaw (2011), by NumPy's Philox4x64-10. Only
its raw 64-bit words are used, whose stream NumPy keeps stable across versions, and integer comparisons: the
same mask comes out on every machine. Nothing here is secret, and nothing here may serve as privacy noise.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedpeft.codec.arrays import Int32Array
from fedpeft.errors import UpdateError

_WORD = 2**64
_MASK_PURPOSE = 2


@dataclass(frozen=True)
class PublicSource:
    """Names one public stream: the run's seed, the round, and the tensor (all below 2^64)."""

    seed: int
    round: int
    tensor: int

    def __post_init__(self) -> None:
        for name in ("seed", "round", "tensor"):
            if not 0 <= getattr(self, name) < _WORD:
                raise UpdateError(f"public mask: {name} {getattr(self, name)} must be from 0 to 2^64 - 1")

    def words(self, count: int) -> npt.NDArray[np.uint64]:
        """The first `count` words of the stream, uint64."""
        counter = np.array([0, self.round, _MASK_PURPOSE, 0], dtype=np.uint64)
        key = np.array([self.seed, self.tensor], dtype=np.uint64)
        return np.random.Philox(counter=counter, key=key).random_raw(count)


def tensor_stream(name: str) -> int:
    """The 64-bit stream number of a tensor: a hash of its canonical name, whatever else the adapter holds."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class RandomKMask:
    """Exactly `count` positions, each set equally likely: those with the smallest words.

    Computing them takes some 17 bytes of memory per entry of the tensor.
    """

    source: PublicSource
    count: int

    def __post_init__(self) -> None:
        if self.count < 0:
            raise UpdateError(f"random-k with count {self.count}: zero or more is needed")

    def indices(self, size: int) -> Int32Array:
        """Flat positions below `size`, ascending int32. Raises UpdateError if size < count."""
        if self.count > size:
            raise UpdateError(f"random-k of {self.count} entries out of {size}: ask for at most the size")
        if self.count == 0:
            return np.empty(0, dtype=np.int32)
        words = self.source.words(size)
        threshold = np.partition(words, self.count - 1)[self.count - 1]
        below = words < threshold
        # Equal words are rare but not impossible: the smaller index goes first.
        ties = np.flatnonzero(words == threshold)[: self.count - int(np.count_nonzero(below))]
        below[ties] = True
        return np.flatnonzero(below).astype(np.int32)


@dataclass(frozen=True)
class BernoulliMask:
    """Each position kept independently with probability `keep_threshold` / 2^64 (0 to 2^64)."""

    source: PublicSource
    keep_threshold: int

    def __post_init__(self) -> None:
        if not 0 <= self.keep_threshold <= _WORD:
            raise UpdateError(f"Bernoulli mask: keep threshold {self.keep_threshold} must be from 0 to 2^64")

    def indices(self, size: int) -> Int32Array:
        """Flat positions in a tensor of `size` entries, ascending int32."""
        if self.keep_threshold == _WORD:
            return np.arange(size, dtype=np.int32)
        kept = self.source.words(size) < np.uint64(self.keep_threshold)
        return np.flatnonzero(kept).astype(np.int32)


PublicMask = RandomKMask | BernoulliMask


def keep_threshold(keep_rate: float) -> int:
    """Threshold of a Bernoulli mask for `keep_rate`, exact to 2^-64. Raises UpdateError outside [0, 1]."""
    if not 0.0 <= keep_rate <= 1.0:
        raise UpdateError(f"keep rate {keep_rate}: a probability from 0 to 1 is needed")
    numerator, denominator = float(keep_rate).as_integer_ratio()
    return numerator * _WORD // denominator
