"""The exact seed space as a space: the state is a few integers, and so is an update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpeft.seedspace.accumulate import accumulate
from fedpeft.seedspace.layout import Span
from fedpeft.seedspace.space import SeedSpace
from fedpeft.seedspace.state import SeedState
from fedpeft.seedspace.trainable_tensors import trainable_parameters
from fedpeft.spaces.base import Memory, Parameters, Route, Trail
from fedpeft.spaces.fingerprint import fingerprint, refuse_other_weights
from fedpeft.spaces.seed_modes import AMOUNTS, NEXT, Mode
from fedpeft.spaces.seed_options import LARGEST, RESOLUTION
from fedpeft.spaces.seed_rules import FINGERPRINT, SeedRules, check_amounts
from fedpeft.spaces.timing import least_s
from fedpeft.updates.update import Arrays, Layout

__all__ = ["LARGEST", "SeedScalars"]

REPLAY_SAMPLE = 2**16  # weights


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
        self._rules = SeedRules(mode, largest, self._weigh)
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
        return self._rules.start()

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
        return self._rules.update_layout(state)

    def sum_layout(self, state: Layout) -> Layout:
        """The mode's arrays."""
        return self._rules.sum_layout(state)

    def align(self, arrays: Arrays, age: int) -> Arrays:
        """See `SeedRules`."""
        return self._rules.align(arrays, age)

    def check(self, arrays: Arrays, *, state: Arrays, who: str) -> None:
        """See `SeedRules`."""
        self._rules.check(arrays, state=state, who=who)

    def apply(self, state: Arrays, change: Mapping[str, NDArray[np.floating[Any]]]) -> Arrays:
        """See `SeedRules`."""
        return self._rules.apply(state, change)

    def _weigh(self, amounts: NDArray[np.int64]) -> NDArray[np.int64]:
        self._move({AMOUNTS: amounts})
        weights = {name: torch.empty_like(tensor) for name, tensor in self._position.base.items()}
        self._position.write(weights)
        return fingerprint(weights)

    def _move(self, state: Arrays) -> None:
        """Bring the cached sums to a state."""
        amounts = check_amounts(state, self.space.num_seeds)
        difference = torch.from_numpy(amounts - self._position.amounts.numpy())
        if bool(difference.any()):
            self._position.advance(difference)


def _scalars(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Integers as scalars of standard deviation 2 become at the default quantum."""
    return np.rint(2.0 ** (RESOLUTION + 1) * rng.standard_normal(count)).astype(np.int64)
