"""From a tensor's change to a few integers and back: on shared sign directions, or by a Hadamard sketch.

Both are linear, so clients' coefficients may be averaged, and unbiased: the mean of what `rebuild` makes of
`coefficients`, over the seeds, is the change, up to the rounding of coefficients to integers. A rebuilt
change of d weights on K coefficients is off by sqrt(d / K) times the change's own length, since it is that of
a few directions among many; the mean over clients and rounds is nearer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from fedpeft.seedspace.accumulate import accumulate
from fedpeft.seedspace.layout import CounterStream, Span
from fedpeft.seedspace.project import project
from fedpeft.seedspace.srht import BlockHadamard

_BLOCK = 2**12  # coordinates that one Hadamard transform mixes


class Projection(Protocol):
    """One tensor's projection; every round has one of its own."""

    @property
    def count(self) -> int:
        """How many coefficients the tensor has."""
        ...

    @property
    def work(self) -> int:
        """What `rebuild` costs, in a unit that all tensors of a run share."""
        ...

    def coefficients(self, change: torch.Tensor, round_: int) -> torch.Tensor:
        """int64 [count] of the int64 [size] change of a round, counted from 0."""
        ...

    def rebuild(self, coefficients: torch.Tensor, round_: int) -> torch.Tensor:
        """int64 [size]: what the coefficients of a round say the change was."""
        ...


@dataclass(frozen=True)
class Signs:
    """Dot products with `count` sign directions, the same for all clients of a round and fresh in the next.

    Source: Shu et al. 2025, Ferret, equations 4-6. There directions are Gaussian, truncated to nearly uniform
    ones, and the released code's factor is a third of the unbiased one; for signs the factor is 1 / count.
    """

    seed: int
    tensor_id: int
    size: int
    count: int
    stride: int = 0  # between the first directions of two rounds; 0: `count`

    @property
    def work(self) -> int:
        """Additions."""
        return self.size * self.count

    def coefficients(self, change: torch.Tensor, round_: int) -> torch.Tensor:
        """Each dot product times the factor, rounded to the nearest integer."""
        dots = project(CounterStream(self.seed), self._span, self._directions(round_), change)
        return divide_rounded(dots, self.count)

    def rebuild(self, coefficients: torch.Tensor, round_: int) -> torch.Tensor:
        """The directions, each times its coefficient."""
        return accumulate(
            CounterStream(self.seed),
            self._span,
            self._directions(round_),
            coefficients,
            device=coefficients.device,
        )

    @property
    def _span(self) -> Span:
        return Span(self.tensor_id, 0, self.size)

    def _directions(self, round_: int) -> torch.Tensor:
        first = round_ * (self.stride or self.count)
        return torch.arange(first, first + self.count)


@dataclass(frozen=True)
class Sketch:
    """Some coefficients of a randomised Hadamard transform of each block.

    It costs d log d additions where `Signs` costs count times d.

    Source: Ailon and Chazelle 2009; see `fedpeft.seedspace.srht`.
    """

    seed: int
    tensor_id: int
    size: int
    block: int
    rows: int

    @property
    def count(self) -> int:
        """Coefficients of all blocks."""
        return self._transform(0).num_coefficients

    @property
    def work(self) -> int:
        """Additions, in units of the logarithm of a block's length."""
        return self.size

    def coefficients(self, change: torch.Tensor, round_: int) -> torch.Tensor:
        """Each kept coefficient over the number kept of its block, rounded to the nearest integer."""
        kept = self._transform(round_).project(change).flatten()
        return divide_rounded(kept, self.rows)

    def rebuild(self, coefficients: torch.Tensor, round_: int) -> torch.Tensor:
        """The transposed transform of the coefficients."""
        return self._transform(round_).reconstruct(coefficients.view(-1, self.rows))

    def _transform(self, round_: int) -> BlockHadamard:
        return BlockHadamard(self.seed, round_, self.tensor_id, self.size, self.block, self.rows)


def divide_rounded(values: torch.Tensor, by: int) -> torch.Tensor:
    """int64 values over a positive integer, to nearest with ties upwards, in integers throughout."""
    return torch.div(2 * values + by, 2 * by, rounding_mode="floor")


def signs(seed: int, tensor_id: int, size: int, count: int) -> Projection:
    """As many directions as asked for."""
    return Signs(seed, tensor_id, size, count)


def sketch(seed: int, tensor_id: int, size: int, count: int) -> Projection:
    """Blocks such that about `count` coefficients are kept, and at least one of each."""
    block = min(_power_of_two(size), max(_BLOCK, _power_of_two(-(-size // count))))
    blocks = -(-size // block)
    return Sketch(seed, tensor_id, size, block, max(1, min(block, count // blocks)))


def _power_of_two(number: int) -> int:
    """The least power of two that is not below a positive number."""
    return int(1 << (number - 1).bit_length())


PROJECTIONS = {"signs": signs, "srht": sketch}
