"""Block-wise subsampled randomised Hadamard transform, exact in integers.

A block x of n coordinates (n a power of two, the last one padded with zeros) becomes y = S H D x: D random
signs, H the Hadamard matrix of +1 and -1, S the choice of m of the n rows without replacement. Since H H =
n I and each row is kept with probability m / n,

    E[ D H S^T y ] / m = D H H D x / n = x,

so `reconstruct(...) / m` is unbiased. The transform costs d log2 n additions for all coefficients, where a
dot product with a random direction costs d for each.

Source: Ailon and Chazelle, "The fast Johnson-Lindenstrauss transform" (2009); Tropp, "Improved analysis of
the subsampled randomized Hadamard transform" (2011). We differ in leaving H unnormalised, so that integers
stay integers, and in drawing signs and rows from the counter-based generator.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fedpeft.errors import UpdateError
from fedpeft.seedspace.accumulate import accumulate
from fedpeft.seedspace.layout import CounterStream, Purpose, Span
from fedpeft.seedspace.philox import philox_numpy

# Blocks that are transformed together: 4 MB of int64 at n = 2^14.
_TOGETHER = 2**19
_LIMIT = 2**62


@dataclass(frozen=True, slots=True)
class BlockHadamard:
    """The transform of one tensor in one round.

    `seed` is the run's, `step` the round (fresh signs and rows each), `size` the tensor's coordinates,
    `block` the length n of a block and `rows` the coefficients m kept of each.

    Raises: UpdateError unless n is a power of two from 1 up and 1 <= m <= n.
    """

    seed: int
    step: int
    tensor_id: int
    size: int
    block: int
    rows: int

    def __post_init__(self) -> None:
        if self.block < 1 or self.block & (self.block - 1) or self.block > 2**24:
            raise UpdateError(f"blocks of {self.block} coordinates: need a power of two up to 2^24")
        if not 1 <= self.rows <= self.block:
            raise UpdateError(f"{self.rows} coefficients of blocks of {self.block}: need 1 to {self.block}")
        if self.size < 1:
            raise UpdateError(f"a tensor of {self.size} coordinates has nothing to project")

    @property
    def num_blocks(self) -> int:
        """Blocks, the padded one included."""
        return -(-self.size // self.block)

    @property
    def num_coefficients(self) -> int:
        """Coefficients of all blocks."""
        return self.num_blocks * self.rows

    def project(self, delta: torch.Tensor) -> torch.Tensor:
        """int64 [num_blocks, rows] of int64 [size]: exact, hence additive over clients in any order.

        Raises: UpdateError for another shape or type, or when a coefficient could leave 62 bits.
        """
        _check(delta, (self.size,), self.block)
        result = torch.empty(self.num_blocks, self.rows, dtype=torch.int64, device=delta.device)
        for first, last, kept in self._groups(delta.device):
            part = self._apply_signs(delta, first, last)
            result[first:last] = hadamard(part).gather(1, kept)
        return result

    def reconstruct(self, coefficients: torch.Tensor) -> torch.Tensor:
        """int64 [size]: D H S^T y, which is `rows` times an unbiased estimate of what was projected.

        Raises: UpdateError for another shape or type, or when a coordinate could leave 62 bits.
        """
        _check(coefficients, (self.num_blocks, self.rows), self.rows)
        device = coefficients.device
        result = torch.empty(self.size, dtype=torch.int64, device=device)
        for first, last, kept in self._groups(device):
            spread = torch.zeros(last - first, self.block, dtype=torch.int64, device=device)
            spread.scatter_(1, kept, coefficients[first:last])
            begin, end = first * self.block, min(last * self.block, self.size)
            result[begin:end] = hadamard(spread).flatten()[: end - begin] * self._signs(begin, end, device)
        return result

    def _groups(self, device: torch.device) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first block, last block, int64 [blocks, rows] of kept rows), a few blocks at a time."""
        step = max(1, _TOGETHER // self.block)
        for first in range(0, self.num_blocks, step):
            last = min(first + step, self.num_blocks)
            kept = [sample_rows(self._stream_of_rows, self.tensor_id, b, self.block, self.rows)
                    for b in range(first, last)]  # fmt: skip
            yield first, last, torch.tensor(kept, dtype=torch.int64, device=device)

    @property
    def _stream_of_rows(self) -> CounterStream:
        return CounterStream(self.seed, Purpose.HADAMARD_ROWS, self.step)

    def _apply_signs(self, delta: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """[blocks, n]: D x, padded with zeros."""
        begin, end = first * self.block, min(last * self.block, self.size)
        part = torch.zeros((last - first) * self.block, dtype=torch.int64, device=delta.device)
        torch.mul(delta[begin:end], self._signs(begin, end, delta.device), out=part[: end - begin])
        return part.view(-1, self.block)

    def _signs(self, begin: int, end: int, device: torch.device) -> torch.Tensor:
        one = torch.ones(1, dtype=torch.int64)
        stream = CounterStream(self.seed, Purpose.HADAMARD_SIGNS, self.step)
        return accumulate(stream, Span(self.tensor_id, begin, end), one - 1, one, device=device)


def hadamard(values: torch.Tensor) -> torch.Tensor:
    """[blocks, n] times the Hadamard matrix in Sylvester's order, n a power of two; exact for integers.

    Entry (i, j) of the matrix is -1 to the number of set bits of i AND j. The last log2(n) axes of length
    two are summed and differenced one after another.
    """
    blocks, length = values.shape
    half = 1
    while half < length:
        pairs = values.view(blocks, length // (2 * half), 2, half)
        values = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2)
        half *= 2
    return values.reshape(blocks, length)


def sample_rows(stream: CounterStream, tensor_id: int, block: int, length: int, count: int) -> list[int]:
    """`count` different numbers below `length`, ascending, the same on every machine.

    The first `count` steps of a Fisher-Yates shuffle; draw i is (word * (length - i)) >> 32, which favours
    a number by at most length / 2^32.
    """
    groups = np.arange(-(-count // 4), dtype=np.uint64)
    words = np.stack(
        philox_numpy((groups, *stream.counter_words(tensor_id)), (block, stream.key_word)), axis=1
    )
    moved: dict[int, int] = {}
    chosen = []
    for place, word in enumerate(words.flatten()[:count].tolist()):
        other = place + (word * (length - place) >> 32)
        chosen.append(moved.get(other, other))
        moved[other] = moved.get(place, place)
    return sorted(chosen)


def _check(values: torch.Tensor, shape: tuple[int, ...], terms: int) -> None:
    """Refuses what isn't int64 of `shape`, or could overflow in a sum of `terms`."""
    if values.dtype != torch.int64 or tuple(values.shape) != shape:
        raise UpdateError(f"integers are {values.dtype} of shape {tuple(values.shape)}: need int64 {shape}")
    largest = max(abs(int(values.min())), abs(int(values.max())))
    if largest * terms >= _LIMIT:
        raise UpdateError(f"integers reach {largest}: sums of {terms} could overflow, use a coarser quantum")
