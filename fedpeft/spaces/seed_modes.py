"""Which directions a client visits, and what of its visits the server keeps: three modes, one class each.

In every mode the model is theta_0 + quantum * sum_k A_k z_k, and ``amounts`` of the state is A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import TrainingError, UpdateError
from fedpeft.spaces.base import Trail
from fedpeft.updates.update import Arrays, Layout

AMOUNTS, MAGNITUDES, VISITS, NEXT = "amounts", "magnitudes", "visits", "next"
Integers = NDArray[np.int64]
Change = Mapping[str, NDArray[np.floating[Any]]]

_COUNT_UNIT = 2**10  # mean visits per client and round are fractions: they are kept in 1024ths


class Mode(Protocol):
    """What tells one seed-scalar method from another."""

    @property
    def num_seeds(self) -> int:
        """K: how many directions the run has, all rounds together."""
        ...

    def start(self) -> dict[str, Integers]:
        """The mode's arrays of the state before round 1; `AMOUNTS` is among them."""
        ...

    def layout(self) -> Layout:
        """Arrays of an update."""
        ...

    def sum_layout(self) -> Layout:
        """Arrays of an update as it is summed."""
        ...

    def align(self, arrays: Arrays, age: int) -> Arrays:
        """An update as it is summed, whose state was `age` rounds old."""
        ...

    def directions(self, state: Arrays, visits: int, rng: np.random.Generator) -> Integers:
        """int64 [visits]: where a client goes."""
        ...

    def express(self, state: Arrays, trail: Trail) -> dict[str, Integers]:
        """A client's visits, summed by direction."""
        ...

    def apply(self, state: Arrays, change: Change) -> dict[str, Integers]:
        """The mode's arrays of the next state."""
        ...


def round_to_integers(values: NDArray[np.floating[Any]]) -> Integers:
    """Nearest integers, ties to even: the one place where a strategy's floats become integers again.

    Raises:
        UpdateError: not finite, or beyond 2**53.
    """
    if not bool((np.abs(values) < 2**53).all()):  # false for NaN too
        raise UpdateError("the aggregated scalars are not finite or exceed 2^53; the state stays as it was")
    whole: Integers = np.rint(values).astype(np.int64)
    return whole


def _sum(length: int, directions: Integers, values: Integers) -> Integers:
    result = np.zeros(length, dtype=np.int64)
    np.add.at(result, directions, values)
    return result


def _layout(length: int, *names: str) -> Layout:
    return {name: ((length,), np.dtype(np.int64).str) for name in sorted(names)}


@dataclass(frozen=True)
class FixedSeeds:
    """K candidates for the whole run; every step goes along one of them, all equally likely.

    Source: Qin et al. 2024, FedKSeed, algorithm 1; scalars are integers here.
    """

    num_seeds: int

    def start(self) -> dict[str, Integers]:
        """A = 0."""
        return {AMOUNTS: np.zeros(self.num_seeds, dtype=np.int64)}

    def layout(self) -> Layout:
        """int64 [K] amounts."""
        return _layout(self.num_seeds, AMOUNTS)

    def sum_layout(self) -> Layout:
        """The same."""
        return self.layout()

    def align(self, arrays: Arrays, age: int) -> Arrays:
        """Itself: the candidates are those of the whole run."""
        return arrays

    def directions(self, state: Arrays, visits: int, rng: np.random.Generator) -> Integers:
        """Uniform, with replacement."""
        return np.asarray(rng.integers(0, self.num_seeds, size=visits, dtype=np.int64))

    def express(self, state: Arrays, trail: Trail) -> dict[str, Integers]:
        """The client's own A."""
        return {AMOUNTS: _sum(self.num_seeds, trail.directions, trail.amounts)}

    def apply(self, state: Arrays, change: Change) -> dict[str, Integers]:
        """A plus the rounded change."""
        return {AMOUNTS: state[AMOUNTS] + round_to_integers(change[AMOUNTS])}


@dataclass(frozen=True)
class WeightedSeeds:
    """K candidates, those with larger scalars so far likelier: FedKSeed-Pro.

    Source: Qin et al. 2024, FedKSeed-Pro. p = softmax(minmax(amplitude)), where a candidate's amplitude is
    the mean size of its scalars over all visits and one further zero. The published server keeps every
    scalar; here clients send two sums (sizes, visits), which aggregate like the amounts and which secure
    aggregation can serve. Both are means over a round's clients, in which one client's visit is one part in
    `cohort`: so is the further zero. They are weighted as the updates are; with equal weights the amplitudes
    are the published ones.
    """

    num_seeds: int
    clip: int  # a visit counts for at most so many quanta; the published 1000 in units of the scalar
    cohort: int = 1  # clients whose updates a round averages

    def start(self) -> dict[str, Integers]:
        """A = 0 and nothing seen."""
        names = (AMOUNTS, MAGNITUDES, VISITS)
        return {name: np.zeros(self.num_seeds, dtype=np.int64) for name in names}

    def layout(self) -> Layout:
        """int64 [K] each: amounts, sums of sizes, numbers of visits."""
        return _layout(self.num_seeds, AMOUNTS, MAGNITUDES, VISITS)

    def sum_layout(self) -> Layout:
        """The same."""
        return self.layout()

    def align(self, arrays: Arrays, age: int) -> Arrays:
        """Itself: the candidates are those of the whole run."""
        return arrays

    def probabilities(self, state: Arrays) -> NDArray[np.float64]:
        """float64 [K], sum 1; the largest is at most e times the smallest."""
        amplitude = state[MAGNITUDES] / (state[VISITS] + _COUNT_UNIT / self.cohort)
        spread = amplitude.max() - amplitude.min()
        share = (amplitude - amplitude.min()) / spread if spread > 0 else np.zeros(self.num_seeds)
        weight = np.exp(share)
        return np.asarray(weight / weight.sum(), dtype=np.float64)

    def directions(self, state: Arrays, visits: int, rng: np.random.Generator) -> Integers:
        """By the probabilities, with replacement."""
        return rng.choice(self.num_seeds, size=visits, p=self.probabilities(state)).astype(np.int64)

    def express(self, state: Arrays, trail: Trail) -> dict[str, Integers]:
        """The client's own three sums."""
        sizes = np.minimum(np.abs(trail.amounts), self.clip)
        return {
            AMOUNTS: _sum(self.num_seeds, trail.directions, trail.amounts),
            MAGNITUDES: _sum(self.num_seeds, trail.directions, sizes),
            VISITS: _sum(self.num_seeds, trail.directions, np.ones_like(sizes)),
        }

    def apply(self, state: Arrays, change: Change) -> dict[str, Integers]:
        """Every array plus its rounded change; sizes and visits in 1024ths."""
        unit = {AMOUNTS: 1, MAGNITUDES: _COUNT_UNIT, VISITS: _COUNT_UNIT}
        return {name: state[name] + round_to_integers(change[name] * unit[name]) for name in unit}


@dataclass(frozen=True)
class CommonDirections:
    """Fresh directions in every round, the same for all its clients, each visited equally often.

    Every scalar of a round is measured by every client: what robust rules, central noise and secure sums
    need. The state says which directions come next, so a round that failed uses up none.

    Where rounds are buffered, one round's updates were measured along the directions of several rounds, the
    last `window` ones. They are summed side by side, a row of scalars for each age.
    """

    per_round: int
    rounds: int
    window: int = 1

    @property
    def num_seeds(self) -> int:
        """Directions of all rounds."""
        return self.per_round * self.rounds

    def start(self) -> dict[str, Integers]:
        """A = 0, and the first direction is 0."""
        return {AMOUNTS: np.zeros(self.num_seeds, dtype=np.int64), NEXT: np.zeros(1, dtype=np.int64)}

    def layout(self) -> Layout:
        """int64 [S] amounts, S the directions of one round."""
        return _layout(self.per_round, AMOUNTS)

    def sum_layout(self) -> Layout:
        """int64 [window * S], the directions of this round first, then those of the round before it."""
        return _layout(self.window * self.per_round, AMOUNTS)

    def align(self, arrays: Arrays, age: int) -> Arrays:
        """The scalars in the row of their round, zeros in the others."""
        if self.window == 1:
            return arrays
        rows = np.zeros((self.window, self.per_round), dtype=np.int64)
        rows[age] = arrays[AMOUNTS]
        return {AMOUNTS: rows.reshape(-1)}

    def directions(self, state: Arrays, visits: int, rng: np.random.Generator) -> Integers:
        """The round's directions one after another, as often as that takes.

        Raises:
            TrainingError: some would be visited more often than others, or all rounds are over.
        """
        if visits % self.per_round:
            raise TrainingError(
                f"{visits} visits to {self.per_round} common directions; set training.steps so that steps"
                " times queries is a multiple of space.num_seeds"
            )
        return self._first(state) + np.arange(visits, dtype=np.int64) % self.per_round

    def express(self, state: Arrays, trail: Trail) -> dict[str, Integers]:
        """The client's own A over the round's directions."""
        return {AMOUNTS: _sum(self.per_round, trail.directions - self._first(state), trail.amounts)}

    def apply(self, state: Arrays, change: Change) -> dict[str, Integers]:
        """The parts of A that belong to the last rounds' directions; those of a later one are still zero."""
        first = self._first(state)
        amounts = np.array(state[AMOUNTS])
        for age, row in enumerate(round_to_integers(change[AMOUNTS]).reshape(-1, self.per_round)):
            begin = first - age * self.per_round
            if begin >= 0:  # nobody can have started before the first state
                amounts[begin : begin + self.per_round] += row
        return {AMOUNTS: amounts, NEXT: np.array([first + self.per_round], dtype=np.int64)}

    def _first(self, state: Arrays) -> int:
        first = int(state[NEXT][0])
        if not 0 <= first <= self.num_seeds - self.per_round or first % self.per_round:
            raise TrainingError(f"the state is at direction {first}; this run has {self.num_seeds}")
        return first
