"""The exact seed space as a space: the state is a few integers, and so is an update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpeft.config import Count, RunConfig, Section, TrainingSection
from fedpeft.errors import ModelError, UpdateError
from fedpeft.seedspace.accumulate import accumulate
from fedpeft.seedspace.layout import Span
from fedpeft.seedspace.space import SeedSpace
from fedpeft.seedspace.state import MAX_INT32, SeedState
from fedpeft.seedspace.trainable import trainable_parameters, trainable_shapes
from fedpeft.spaces.base import Memory, Parameters, Route, Trail
from fedpeft.spaces.directions import direction_stream
from fedpeft.spaces.fingerprint import FINGERPRINT, fingerprint, refuse_other_weights
from fedpeft.spaces.seed_modes import AMOUNTS, NEXT, CommonDirections, FixedSeeds, Mode, WeightedSeeds
from fedpeft.spaces.timing import least_s
from fedpeft.update import Arrays, Layout, frozen_arrays

RESOLUTION = 8  # bits: a scalar of 1 moves lr, or 2**8 quanta up to a factor of two
LARGEST = 2**24  # quanta that one client may move along one direction in one round
REPLAY_SAMPLE = 2**16  # weights
PUBLISHED_CLIP = 1000.0  # of a scalar's size, in FedKSeed-Pro's amplitudes


class SeedScalarsOptions(Section):
    """Seed-scalars as the run file describes them.

    `num_seeds` is K, or with mode "common" the directions of one round. The quantum is 2**quantum_exponent;
    by default the power of two at or below ``lr * 2**-8``.
    """

    kind: ClassVar[str] = "seed-scalars"

    mode: Literal["fedkseed", "fedkseed-pro", "common"] = "fedkseed"
    num_seeds: Count = 4096
    quantum_exponent: int | None = None

    def open(self, run: RunConfig, model: nn.Module) -> SeedScalars:
        """Take theta_0 from the model.

        Raises:
            ModelError: nothing is trainable, or a trainable tensor is not contiguous.
            UpdateError: K or the quantum is out of range.
        """
        lr = run.training.lr
        exponent = self.exponent(lr)
        mode = self._mode(run, exponent)
        space = SeedSpace(direction_stream(run, model), mode.num_seeds, exponent, trainable_shapes(model))
        return SeedScalars(space, mode, model, largest_amount(run, exponent))

    def exponent(self, lr: float) -> int:
        """log2 of the quantum."""
        default = math.frexp(lr)[1] - 1 - RESOLUTION  # frexp's mantissa is in [1/2, 1)
        return default if self.quantum_exponent is None else self.quantum_exponent

    def _mode(self, run: RunConfig, exponent: int) -> Mode:
        if self.mode == "common":
            buffer = run.federation.buffer
            return CommonDirections(
                self.num_seeds, run.run.rounds, 1 if buffer is None else buffer.max_staleness + 1
            )
        if self.mode == "fedkseed-pro":
            return WeightedSeeds(self.num_seeds, quanta(PUBLISHED_CLIP * run.training.lr, exponent))
        return FixedSeeds(self.num_seeds)


def quanta(length: float, exponent: int) -> int:
    """A positive length in quanta, rounded up, at most `LARGEST`."""
    return min(LARGEST, math.ceil(math.ldexp(length, -exponent)))


def largest_amount(run: RunConfig, exponent: int) -> int:
    """The most quanta along one direction that an honest client of any group can reach in a round.

    With `training.max_scalar` and `training.steps` that is what all visits to one direction add up to;
    otherwise the general bound.
    """
    parts = [run, *(run.of_group(group) for group in run.groups)]
    return max(_largest_amount(part.training, exponent) for part in parts)


def _largest_amount(training: TrainingSection, exponent: int) -> int:
    if training.max_scalar is None or training.steps is None:
        return LARGEST
    return min(
        LARGEST, training.steps * training.queries * quanta(training.lr * training.max_scalar, exponent)
    )


class SeedScalars:
    """State: A and a fingerprint of the weights it stands for. Update: a client's own A.

    It holds theta_0 and, as a cache, the integer sums of the last state that was entered: the next state
    costs only the directions whose amounts changed. Nothing it returns depends on that history.
    """

    kind: ClassVar[str] = "seed-scalars"

    def __init__(self, space: SeedSpace, mode: Mode, model: nn.Module, largest: int) -> None:
        self.space = space
        self.mode = mode
        self.largest = largest
        self._live = trainable_parameters(model)
        base = {name: parameter.detach().clone() for name, parameter in self._live.items()}
        self._position = SeedState(space, base)
        self._verified: tuple[bytes, bytes] | None = None  # amounts and fingerprint that were found to agree

    def facts(self) -> Mapping[str, str]:
        """K, the directions of one round where they are common, the quantum and the range."""
        per_round = self.mode.layout()[AMOUNTS][0][0]
        return {
            "directions (K)": f"{self.space.num_seeds:,}",
            "directions of one round": f"{per_round:,}",
            "quantum": f"2^{self.space.exponent}",
            "most quanta per direction": f"{self.largest:,}",
        }

    def example(self, state: Arrays, visits: int, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        """Scalars of standard deviation 2, a common size of directional derivatives."""
        route = self.route(state, visits, rng)
        update = self.express({}, state, Trail(route.directions, _scalars(visits, rng)))
        midway = {name: _scalars(array.size, rng) for name, array in self.mode.start().items()}
        midway |= {name: np.abs(array) for name, array in midway.items() if name != AMOUNTS}
        if NEXT in midway:  # later rounds' directions are still to come
            per_round = len(update[AMOUNTS])
            midway[NEXT][0] = self.space.num_seeds // per_round // 2 * per_round
            midway[AMOUNTS][midway[NEXT][0] :] = 0
        return {**midway, FINGERPRINT: state[FINGERPRINT]}, update

    def example_step(self, state: Arrays, updates: Sequence[Arrays], rng: np.random.Generator) -> Arrays:
        """The mode's own step; the fingerprint is any other."""
        names = updates[0]
        mean = {name: np.mean([update[name] for update in updates], axis=0) for name in names}
        after = self.mode.apply(state, mean)
        step = {name: array - state[name] for name, array in after.items()}
        return {**step, FINGERPRINT: rng.integers(-(2**32), 2**32, state[FINGERPRINT].size)}

    def replay_s(self) -> float:
        """All K directions over a few blocks of one tensor, scaled to all weights."""
        name = max(sorted(self.space.shapes), key=self.space.size)
        size = min(self.space.size(name), REPLAY_SAMPLE)
        directions = torch.arange(self.space.num_seeds)
        device = self._position.base[name].device
        span = Span(self.space.ids[name], 0, size)

        def work() -> None:
            accumulate(self.space.stream, span, directions, directions + 1, device=device)

        return least_s(work) * self.space.dimension / size

    def initial_state(self, parameters: Parameters) -> Arrays:
        """A = 0."""
        return self._with_fingerprint(self.mode.start())

    def enter(self, parameters: Parameters, state: Arrays) -> None:
        """Write the state's weights, exactly, and compare them with its fingerprint.

        Raises:
            ModelError: other arrays than this run's, or another fingerprint.
            UpdateError: amounts out of range.
        """
        self._move(state)
        self._position.write(self._live)
        seen = (state[AMOUNTS].tobytes(), state[FINGERPRINT].tobytes())
        if seen == self._verified:
            return
        refuse_other_weights(self._live, state[FINGERPRINT])
        self._verified = seen

    def route(self, state: Arrays, visits: int, rng: np.random.Generator) -> Route:
        """Directions as the mode chooses them."""
        directions = self.mode.directions(state, visits, rng)
        return Route(directions, self.space.exponent, self.largest)

    def express(
        self,
        parameters: Parameters,
        state: Arrays,
        trail: Trail | None = None,
        memory: Memory | None = None,
    ) -> Arrays:
        """What the trail moved; nothing without a trail. The parameters themselves are not looked at."""
        none = np.zeros(0, dtype=np.int64)
        return self.mode.express(state, trail if trail is not None else Trail(none, none))

    def update_layout(self, state: Layout) -> Layout:
        """The mode's arrays."""
        return self.mode.layout()

    def sum_layout(self, state: Layout) -> Layout:
        """The mode's arrays."""
        return self.mode.sum_layout()

    def placed(self, arrays: Arrays, age: int) -> Arrays:
        """As the mode does: by the directions that it was measured along."""
        return self.mode.placed(arrays, age)

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
        reach, room = magnitude(arrays[AMOUNTS]), MAX_INT32 - magnitude(state[AMOUNTS]) - self.space.num_seeds
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

    def _with_fingerprint(self, arrays: dict[str, NDArray[np.int64]]) -> Arrays:
        self._move(arrays)
        weights = {name: torch.empty_like(tensor) for name, tensor in self._position.base.items()}
        self._position.write(weights)
        return frozen_arrays({**arrays, FINGERPRINT: fingerprint(weights)})

    def _move(self, state: Arrays) -> None:
        """Bring the cached sums to a state."""
        amounts = state.get(AMOUNTS)
        if amounts is None or amounts.dtype != np.int64 or amounts.shape != (self.space.num_seeds,):
            raise ModelError(
                f"the state has no int64 [{self.space.num_seeds}] array {AMOUNTS!r}; it must come from the"
                " same [space] section"
            )
        total = magnitude(amounts)
        if total > MAX_INT32:
            raise UpdateError(
                f"the state's scalars would add up to {total} quanta and {MAX_INT32} is the most; set a"
                " larger space.quantum_exponent, or lower training.lr"
            )
        difference = torch.from_numpy(amounts - self._position.amounts.numpy())
        if bool(difference.any()):
            self._position.advance(difference)


def magnitude(amounts: NDArray[np.int64]) -> int:
    """Sum of |A_k|, in Python's integers: it cannot wrap, whatever came."""
    return sum(abs(amount) for amount in amounts.tolist())


def _scalars(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Integers as scalars of standard deviation 2 become at the default quantum."""
    return np.rint(2.0 ** (RESOLUTION + 1) * rng.standard_normal(count)).astype(np.int64)
