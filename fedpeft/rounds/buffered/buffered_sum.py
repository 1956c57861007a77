"""The weighted sum of a buffer's updates, exact whatever their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fedpeft.aggregation.exact_sum import ExactSum
from fedpeft.aggregation.staleness import UNIT
from fedpeft.errors import UpdateError
from fedpeft.rounds.strategies import StrategyRunner
from fedpeft.spaces import ServerSpace
from fedpeft.updates.packed import PackedArrays
from fedpeft.updates.update import Arrays, Layout, Update


class BufferedSum:
    """One buffer: the sum of s(staleness) * weight * update over the sum of the weights.

    Source: Nguyen et al. 2022, FedBuff, algorithm 1: the mean over the buffer is not divided by the sum of
    the staleness weights, so old updates make a round's step shorter. With weighting 'uniform' the divisor is
    the buffer's size, as there; with 'examples' updates are weighted by their rows as in synchronous rounds.

    The staleness weight is a whole number of units of 1/1024, so the sum stays one of integers; the division
    is the only rounding.

    Args:
        strategy: its layout is that of sums.
        layout: of an update.
        weigh: staleness to units.
        capacity: the most updates.
    """

    def __init__(
        self,
        strategy: StrategyRunner,
        space: ServerSpace,
        layout: Layout,
        weigh: Callable[[int], int],
        *,
        capacity: int,
        quantum_exponent: int,
    ) -> None:
        self._strategy, self._space, self._weigh = strategy, space, weigh
        self.layout = layout
        self._sum = ExactSum(strategy.layout, quantum_exponent=quantum_exponent, capacity=capacity)
        integers = np.dtype(next(iter(strategy.layout.values()))[1]).kind == "i"
        self._exponent = 0 if integers else quantum_exponent
        self._weight = 0  # without staleness

    @property
    def count(self) -> int:
        """Updates so far."""
        return self._sum.count

    def sum_of_age(self, staleness: int) -> Aged:
        """The sum as updates of one staleness see it."""
        return Aged(self, staleness)

    def fold(self, client: str, update: Update, staleness: int) -> float:
        """Count one update; returns its L2 norm.

        Raises:
            UpdateError: it must not be counted; nothing of it was.
        """
        placed = self._space.align(update.arrays, staleness)
        units = self._weigh(staleness)
        norm = self._sum.fold(replace(update, arrays=placed, weight=update.weight * units), who=client)
        self._weight += update.weight * UNIT
        return norm

    def close(self, number: int) -> Arrays:
        """The change of a round, by the strategy.

        Raises:
            UpdateError: nothing was folded.
        """
        if not self.count:
            raise UpdateError("no update was counted: a buffer needs at least one")
        sums = self._sum.sums()
        mean = np.ldexp(sums.flat.astype(np.float64), self._exponent) / self._weight
        packed = PackedArrays(mean, sums.packing.like("<f8"))
        return self._strategy.aggregate_mean(number, packed, self._sum.total_weight)


@dataclass(frozen=True)
class Aged:
    """An `Aggregator` for one update."""

    buffer: BufferedSum
    staleness: int

    @property
    def layout(self) -> Layout:
        """Of an update."""
        return self.buffer.layout

    def fold(self, client: str, update: Update) -> float:
        """See `BufferedSum.fold`."""
        return self.buffer.fold(client, update, self.staleness)

    def close(self) -> Arrays:
        """Nothing to close: the round closes its buffer.

        Raises:
            UpdateError: always.
        """
        raise UpdateError("one update of a buffer was to be closed; close the buffer")
