"""What whoever counts seed-scalars does with them: bounds, layouts and the next state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import ModelError, UpdateError
from fedpeft.seedspace.layout import MAX_INT32
from fedpeft.spaces.seed_modes import AMOUNTS, Integers, Mode
from fedpeft.updates.update import Arrays, Layout, freeze_arrays

FINGERPRINT = "fingerprint"  # of the weights that a state stands for, as int64 [8]


@dataclass(frozen=True)
class SeedRules:
    """The server's part of `SeedScalars`, and all that it does without looking at a weight.

    Attributes:
        largest: the most quanta that one client may move along one direction in a round.
        weighed: from int64 [K] amounts to the fingerprint of their weights; see `check_amounts`.
    """

    kind: ClassVar[str] = "seed-scalars"

    mode: Mode
    largest: int
    weighed: Callable[[Integers], Integers]

    def start(self) -> Arrays:
        """The state before round 1: A = 0."""
        return self._with_fingerprint(self.mode.start())

    def update_layout(self, state: Layout) -> Layout:
        """The mode's arrays."""
        return self.mode.layout()

    def sum_layout(self, state: Layout) -> Layout:
        """The mode's arrays."""
        return self.mode.sum_layout()

    def align(self, arrays: Arrays, age: int) -> Arrays:
        """As the mode does: by the directions that it was measured along."""
        return self.mode.align(arrays, age)

    def check(self, arrays: Arrays, *, state: Arrays, who: str) -> None:
        """Refuse scalars out of the agreed range, and what the state's sums have no room for.

        The sum of magnitudes of a mean is at most the largest among those averaged, and rounding adds at most
        half a quantum for each direction.

        Raises:
            UpdateError: naming the first one, or their sum.
        """
        for name, array in arrays.items():
            # Sizes and counts are what later rounds divide by: never negative.
            least = -self.largest if name == AMOUNTS else 0
            beyond = np.flatnonzero((array > self.largest) | (array < least))
            if len(beyond):
                raise UpdateError(
                    f"{who}: {name}[{beyond[0]}] is {array[beyond[0]]}; the agreed range is"
                    f" {least} to {self.largest}"
                )
        reach, room = magnitude(arrays[AMOUNTS]), MAX_INT32 - magnitude(state[AMOUNTS]) - self.mode.num_seeds
        if reach > room:
            raise UpdateError(
                f"{who}: scalars that add up to {reach} quanta came, the model's sums have room for {room};"
                " set a larger space.quantum_exponent, or lower training.lr"
            )

    def apply(self, state: Arrays, change: Mapping[str, NDArray[np.floating[Any]]]) -> Arrays:
        """The next A, after one rounding to integers, with the fingerprint of its weights.

        Raises:
            UpdateError: sum |A_k| would leave 31 bits; the state stays as it was.
        """
        return self._with_fingerprint(self.mode.apply(state, change))

    def _with_fingerprint(self, arrays: dict[str, Integers]) -> Arrays:
        amounts = check_amounts(arrays, self.mode.num_seeds)
        return freeze_arrays({**arrays, FINGERPRINT: self.weighed(amounts)})


def check_amounts(state: Arrays, num_seeds: int) -> Integers:
    """A of a state.

    Raises:
        ModelError: it is not there, or of another run.
        UpdateError: its sum of magnitudes leaves 31 bits.
    """
    amounts = state.get(AMOUNTS)
    if amounts is None or amounts.dtype != np.int64 or amounts.shape != (num_seeds,):
        raise ModelError(
            f"the state has no int64 [{num_seeds}] array {AMOUNTS!r}; it must come from the"
            " same [space] section"
        )
    total = magnitude(amounts)
    if total > MAX_INT32:
        raise UpdateError(
            f"the state's scalars would add up to {total} quanta and {MAX_INT32} is the most; set a"
            " larger space.quantum_exponent, or lower training.lr"
        )
    return amounts


def magnitude(amounts: NDArray[np.int64]) -> int:
    """Sum of |A_k|: it cannot wrap, whatever came."""
    if not len(amounts):
        return 0
    if max(int(amounts.max()), -int(amounts.min())) < 2**62 // len(amounts):
        return int(np.abs(amounts).sum())
    return sum(abs(amount) for amount in amounts.tolist())
