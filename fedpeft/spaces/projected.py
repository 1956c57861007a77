"""First-order training, and of its change only integer coefficients on directions that everyone can draw."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpeft.errors import ModelError, TrainingError, UpdateError
from fedpeft.seedspace.project import quantise
from fedpeft.seedspace.rounding import combine
from fedpeft.spaces.allocation import count_shared, squared_norm, whole_root
from fedpeft.spaces.base import Memory, Parameters, Route, Trail
from fedpeft.spaces.fingerprint import fingerprint, refuse_other_weights
from fedpeft.spaces.projections import Projection, Signs
from fedpeft.spaces.seed_modes import AMOUNTS, NEXT, round_to_integers
from fedpeft.spaces.seed_rules import FINGERPRINT
from fedpeft.spaces.timing import least_s
from fedpeft.updates.update import Arrays, Layout, freeze_arrays

LARGEST = 2**30  # quanta of one coefficient
MOST = 2**53  # of all coefficients of a tensor in magnitude: sums stay exact
REPLAY_SAMPLE = 2**26  # units of a projection's work


class Projected:
    """State: every round's coefficients and a fingerprint. Update: one round's coefficients of one client.

    theta = theta_0 + quantum * sum over rounds of what the round's coefficients rebuild to. The sums are
    integers, so a late joiner who replays all rounds holds the veterans' bits.

    A round has `sets` sets of directions and a client uses one of them; coefficients of an update outside of
    it are zero, so updates are summed like vectors whichever sets they use.

    Source: Shu et al. 2025, Ferret. We differ in sharing a round's directions among clients unless `sets` is
    more than one, in the constant (unbiased), and in integers throughout.
    """

    kind: ClassVar[str] = "projected"

    def __init__(
        self,
        live: Mapping[str, nn.Parameter],
        projections: Mapping[str, Projection],
        exponent: int,
        rounds: int,
        server_lr: float,
        *,
        sets: int = 1,
        by_norm: bool = False,
    ) -> None:
        self.projections = projections
        self.exponent = exponent
        self.count = sum(projection.count for projection in projections.values())
        self.sets = sets
        signs = {name: each for name, each in projections.items() if isinstance(each, Signs)}
        self._by_norm = {name: replace(each, stride=self.count) for name, each in signs.items() if by_norm}
        self._width = sets * self.count  # numbers of one round
        self._rounds, self._server_lr = rounds, server_lr
        self._live = live
        self._base = {name: parameter.detach().clone() for name, parameter in live.items()}
        self._verified = b""
        self._done = np.zeros(0, dtype=np.int64)  # the coefficients that the cached sums are of
        self._sums = self._zeros()
        self._squares = [0] * len(projections)  # of each block's moves in the rounds that the sums are of

    def facts(self) -> Mapping[str, str]:
        """Coefficients, the quantum of a weight, and how far one rebuilt change is off, block by block."""
        sizes = sorted(
            {(self._base[name].numel(), projection.count) for name, projection in self.projections.items()},
            reverse=True,
        )
        errors = {
            f"error, {size:,} weights on {count:,}": f"{math.sqrt(size / count):.2g}" for size, count in sizes
        }
        several = {"sets of directions per round": f"{self.sets:,}"} if self.sets > 1 else {}
        return {
            "coefficients per round": f"{self.count:,}",
            **several,
            "coefficients, all rounds": f"{self._width * self._rounds:,}",
            "quantum": f"2^{self.exponent}",
            **errors,
        }

    def example(self, state: Arrays, visits: int, rng: np.random.Generator) -> tuple[Arrays, Arrays]:
        """Coefficients of standard deviation 8, half of all rounds behind."""
        drawn = np.rint(8 * rng.standard_normal(self._rounds * self._width)).astype(np.int64)
        update = {AMOUNTS: self._in_set(drawn[: self.count], int(rng.integers(self.sets)))}
        drawn[self._rounds // 2 * self._width :] = 0
        return {**state, AMOUNTS: drawn}, update

    def example_step(self, state: Arrays, updates: Sequence[Arrays], rng: np.random.Generator) -> Arrays:
        """The coefficients of one round; the fingerprint is any other."""
        mean = np.mean([update[AMOUNTS] for update in updates], axis=0)
        amounts = np.zeros(self._rounds * self._width, dtype=np.int64)
        amounts[: self._width] = round_to_integers(mean * self._server_lr)
        words = rng.integers(-(2**32), 2**32, state[FINGERPRINT].size)
        return {AMOUNTS: amounts, NEXT: np.ones(1, dtype=np.int64), FINGERPRINT: words}

    def replay_s(self) -> float:
        """One round of the tensor with the most work that is still small, scaled to all of the run."""
        ordered = sorted(self.projections.values(), key=lambda projection: projection.work)
        sample = next((p for p in reversed(ordered) if p.work <= REPLAY_SAMPLE), ordered[0])
        ones = torch.ones(sample.count, dtype=torch.int64)
        share = sum(projection.work for projection in ordered) / sample.work
        return least_s(lambda: sample.rebuild(ones, 0)) * share * self._rounds * self.sets

    def initial_state(self, parameters: Parameters) -> Arrays:
        """No round yet."""
        amounts = np.zeros(self._rounds * self._width, dtype=np.int64)
        return self._with_fingerprint({AMOUNTS: amounts, NEXT: np.zeros(1, dtype=np.int64)})

    def enter(self, parameters: Parameters, state: Arrays) -> None:
        """Rebuild what is new since the last state, write the weights, and compare the fingerprint.

        Raises:
            ModelError: other arrays than this run's, or another fingerprint.
        """
        self._move(state)
        for name, parameter in self._live.items():
            parameter.detach().copy_(self._weights(name))
        seen = state[AMOUNTS].tobytes() + state[FINGERPRINT].tobytes()
        if seen != self._verified:
            refuse_other_weights(self._live, state[FINGERPRINT])
            self._verified = seen

    def route(self, state: Arrays, visits: int, rng: np.random.Generator) -> Route:
        """None: a zeroth-order trainer's own scalars say more than their projection.

        Raises:
            TrainingError: always.
        """
        raise TrainingError("space 'projected' takes first-order changes; use space 'seed-scalars'")

    def express(
        self,
        parameters: Parameters,
        state: Arrays,
        trail: Trail | None = None,
        memory: Memory | None = None,
    ) -> Arrays:
        """The change, rounded to quanta and projected tensor by tensor.

        Raises:
            UpdateError: a change that is not finite, or too large for its quantum.
        """
        self._move(state)
        number = int(state[NEXT][0])
        wholes = {}
        for name in self.projections:
            change = self._live[name].detach().double() - self._weights(name).double()
            wholes[name] = quantise(change, self.exponent).flatten()
        chosen = 0 if self.sets == 1 else _set_of(wholes, self.sets)
        draw = number * self.sets + chosen
        parts = [
            projection.coefficients(wholes[name], draw).cpu().numpy()
            for name, projection in self._of_next_round().items()
        ]
        return {AMOUNTS: self._in_set(np.concatenate(parts), chosen)}

    def update_layout(self, state: Layout) -> Layout:
        """int64 [sets * coefficients of one set]."""
        return {AMOUNTS: ((self._width,), np.dtype(np.int64).str)}

    def sum_layout(self, state: Layout) -> Layout:
        """That of an update."""
        return self.update_layout(state)

    def align(self, arrays: Arrays, age: int) -> Arrays:
        """Itself; only updates of one round are summed."""
        return arrays

    def check(self, arrays: Arrays, *, state: Arrays, who: str) -> None:
        """Refuse coefficients out of range, of several sets, and what all rounds' have no room for.

        Raises:
            UpdateError: naming the first one, or their sum.
        """
        amounts = arrays[AMOUNTS]
        beyond = np.flatnonzero((amounts > LARGEST) | (amounts < -LARGEST))
        if len(beyond):
            raise UpdateError(
                f"{who}: {AMOUNTS}[{beyond[0]}] is {amounts[beyond[0]]}; the agreed range is {-LARGEST} to"
                f" {LARGEST}"
            )
        used = amounts.reshape(self.sets, -1).any(axis=1).sum() if amounts.size == self._width else 0
        if used > 1:
            raise UpdateError(f"{who}: coefficients in {used} sets of directions; a client uses one of them")
        held = float(np.abs(state[AMOUNTS].astype(np.float64)).sum())
        reach = float(np.abs(amounts.astype(np.float64)).sum()) * self._server_lr + self._width
        if held + reach >= MOST:
            raise UpdateError(
                f"{who}: coefficients that add up to {reach:.3g} came and the model's sums have room for"
                f" {MOST - held:.3g}; set a larger space.quantum_exponent, or lower space.server_lr"
            )

    def apply(self, state: Arrays, change: Mapping[str, NDArray[np.floating[Any]]]) -> Arrays:
        """The mean coefficients times `server_lr`, rounded once, written as the round's own.

        Raises:
            UpdateError: not finite, or too large to be summed exactly.
        """
        number = int(state[NEXT][0])
        amounts = np.array(state[AMOUNTS])
        amounts[number * self._width : (number + 1) * self._width] = round_to_integers(
            change[AMOUNTS] * self._server_lr
        )
        if float(np.abs(amounts.astype(np.float64)).sum()) >= MOST:
            raise UpdateError(
                "the coefficients of all rounds exceed 2^53; set a larger space.quantum_exponent, or lower"
                " training.lr or space.server_lr"
            )
        return self._with_fingerprint({AMOUNTS: amounts, NEXT: np.array([number + 1], dtype=np.int64)})

    def _with_fingerprint(self, arrays: dict[str, NDArray[np.int64]]) -> Arrays:
        self._move(arrays)
        return freeze_arrays(
            {**arrays, FINGERPRINT: fingerprint({name: self._weights(name) for name in self._base})}
        )

    def _weights(self, name: str) -> torch.Tensor:
        return combine(self._base[name], self._sums[name].view(self._base[name].shape), self.exponent)

    def _move(self, state: Arrays) -> None:
        """Bring the cached sums to a state: add its new rounds, or begin anew where an old one differs."""
        amounts, number = self._check(state)
        past = self._done.size // self._width
        if past > number or not np.array_equal(self._done, amounts[: self._done.size]):
            self._sums, self._squares, past = self._zeros(), [0] * len(self.projections), 0
        for round_ in range(past, number):
            part = amounts[round_ * self._width : (round_ + 1) * self._width].reshape(self.sets, self.count)
            self._add_round(part, round_)
        self._done = np.array(amounts[: number * self._width])

    def _add_round(self, part: NDArray[np.int64], round_: int) -> None:
        """Add what a round's coefficients, int64 [sets, count], rebuild to."""
        start, blocks = 0, self._of_next_round()
        for index, (name, projection) in enumerate(blocks.items()):
            device = self._sums[name].device
            for chosen, row in enumerate(part[:, start : start + projection.count]):
                if not row.any():
                    continue
                own = torch.from_numpy(row.copy())
                self._sums[name] += projection.rebuild(own, round_ * self.sets + chosen).to(device)
                self._squares[index] += squared_norm(row.tolist())
            start += projection.count

    def _of_next_round(self) -> Mapping[str, Projection]:
        """The blocks with the coefficients that they have in the round after those of the cached sums."""
        if not self._by_norm:
            return self.projections
        if not any(self._squares):
            return self._by_norm
        counts = count_shared(self.count, [whole_root(square) for square in self._squares])
        return {
            name: replace(block, count=count)
            for (name, block), count in zip(self._by_norm.items(), counts, strict=True)
        }

    def _in_set(self, coefficients: NDArray[np.int64], chosen: int) -> NDArray[np.int64]:
        """A set's coefficients among the zeros of the others: int64 [sets * count]."""
        result = np.zeros((self.sets, self.count), dtype=np.int64)
        result[chosen] = coefficients
        return result.reshape(-1)

    def _zeros(self) -> dict[str, torch.Tensor]:
        return {
            name: torch.zeros(base.numel(), dtype=torch.int64, device=base.device)
            for name, base in self._base.items()
        }

    def _check(self, state: Arrays) -> tuple[NDArray[np.int64], int]:
        amounts, following = state.get(AMOUNTS), state.get(NEXT)
        if (
            amounts is None
            or following is None
            or amounts.dtype != np.int64
            or amounts.shape != (self._rounds * self._width,)
            or following.shape != (1,)
            or not 0 <= int(following[0]) <= self._rounds
        ):
            raise ModelError(
                f"the state is not of {self._rounds} rounds with {self._width} coefficients each; it must"
                " come from the same [space] section"
            )
        return amounts, int(following[0])


def _set_of(wholes: Mapping[str, torch.Tensor], sets: int) -> int:
    """Return which set of directions a change uses, by its digest: over seeds they don't depend on it."""
    digest = hashlib.sha256()
    for whole in wholes.values():
        digest.update(whole.cpu().numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "little") % sets
