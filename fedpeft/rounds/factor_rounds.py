"""Rounds whose updates are parts of the whole, or whose LoRA factors are combined by a rule.

An update becomes a change of the whole state, which the strategy folds as ever, in exact integers. What
depends on all replies at once, products and their distance from the means, is computed when the round closes:
in float64, replies in the order of clients' names, whoever came first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.aggregation.lora_rules import (
    Combined,
    Distance,
    ModuleReplies,
    Shares,
    combine_named,
    distance_of,
    is_residual,
    residual_arrays,
    residuals_of,
    together,
)
from fedpeft.aggregation.robust import Pair, lora_pairs
from fedpeft.config.sections import ClientLevelPrivacy
from fedpeft.ledger.records import Aggregation
from fedpeft.rounds.round_context import RoundContext
from fedpeft.rounds.strategies import Aggregator
from fedpeft.runtime.randomness import stream
from fedpeft.updates.low_rank import LoraFactors
from fedpeft.updates.update import Arrays, Layout, Update, layout_of

Wide = dict[str, NDArray[np.float64]]


def needs_factors(federation: RoundContext) -> bool:
    """Whether rounds differ at all from those in which everybody sends everything, unmeasured."""
    return federation.run.federation.lora_rule is not None or not federation.shares.all_alike


@dataclass(frozen=True)
class _Reply:
    """One client's change of the whole state, as far as it is needed when the round closes."""

    weight: int
    arrays: Arrays
    moved: frozenset[str]


class FactorAggregator:
    """An `Aggregator` around another one.

    Attributes:
        measured: how far the round's mean was from that of the products; None until closed, or where nothing
            is measured.
    """

    def __init__(self, federation: RoundContext, inner: Aggregator, state: Arrays, number: int) -> None:
        self._inner, self._state, self._number = inner, state, number
        self._run = federation.run
        self._shares: Shares = federation.shares
        self._whole = layout_of({name: array for name, array in state.items() if not is_residual(name)})
        frozen = federation.frozen_factors
        self._fixed = {**state, **frozen}
        self._pairs = lora_pairs({**self._whole, **layout_of(frozen)}, federation.run.peft)
        named = self._run.federation.lora_rule
        private = isinstance(self._run.privacy, ClientLevelPrivacy)
        self._combine = None if named is None else combine_named(named)
        # What clients keep to themselves is no part of what can be measured here.
        self._measures = named is not None and not private and not self._shares.rule.keeps
        self._replies: dict[str, _Reply] = {}
        self.measured: Aggregation | None = None

    @property
    def layout(self) -> Layout:
        """Of an update from a client in no group."""
        return self.layout_of("")

    def layout_of(self, client: str) -> Layout:
        """Of a client's update."""
        if self._shares.all_alike:
            return self._inner.layout
        return self._shares.layout(client, self._whole, self._number)

    def fold(self, client: str, update: Update) -> float:
        """Count one update; returns its own L2 norm.

        Raises:
            UpdateError: it must not be counted; nothing of it was.
        """
        wide = update
        if not self._shares.all_alike:
            wide = replace(update, arrays=self._shares.widen(client, update.arrays, self._state))
        norm = self._inner.fold(client, wide)
        if self._measures or not self._shares.all_alike:
            kept = {name: wide.arrays[name] for name in self._factor_names if name in wide.arrays}
            self._replies[client] = _Reply(update.weight, kept, frozenset(update.arrays))
        return norm if wide is update else update.global_norm()

    def close(self) -> Arrays:
        """The change of the whole state, float64; frozen products in it replace the state's.

        Raises:
            FederationError: too few replies for the strategy.
        """
        change: Arrays = self._inner.close()
        if not self._shares.all_alike:
            change = self._settle(change)
        if self._measures and self._replies:
            change = self._combine_modules(change)
        return change

    @property
    def _factor_names(self) -> list[str]:
        return [name for pair in self._pairs for name in (pair.a, pair.b)]

    def _settle(self, change: Arrays) -> Wide:
        """What rests does not move; the mean of what only some train is theirs alone."""
        total = sum(reply.weight for reply in self._replies.values())
        settled: Wide = {}
        for name, array in change.items():
            if self._shares.rests(name, self._number):
                settled[name] = np.zeros(array.shape)
                continue
            trained = sum(reply.weight for reply in self._replies.values() if name in reply.moved)
            partly = 0 < trained < total and not isinstance(self._run.privacy, ClientLevelPrivacy)
            settled[name] = array * (total / trained) if partly else np.asarray(array)
        return settled

    def _combine_modules(self, change: Arrays) -> Arrays:
        """Apply the rule to each module, and measure it."""
        moved: Wide = dict(change)
        residuals = residuals_of(self._state)
        distances: dict[str, Distance] = {}
        for pair in self._pairs:
            given = self._collect_module(pair, residuals)
            if given is None:
                continue
            made = None if self._combine is None else self._combine(given)
            module = pair.a.partition(".lora_A")[0]
            distances[module] = distance_of(given, made)
            if made is not None:
                self._enter(moved, pair, made)
                if made.residual is not None:
                    residuals[module] = made.residual
        moved.update({name: array.astype(np.float64) for name, array in residual_arrays(residuals).items()})
        self.measured = self._aggregation(distances, residuals)
        return moved

    def _collect_module(self, pair: Pair, residuals: Mapping[str, LoraFactors]) -> ModuleReplies | None:
        """A module's round; None if nobody trained it."""
        replies = [reply for _, reply in sorted(self._replies.items()) if reply.moved & {pair.a, pair.b}]
        if not replies:
            return None
        total = sum(reply.weight for reply in replies)
        module = pair.a.partition(".lora_A")[0]
        return ModuleReplies(
            state=LoraFactors(self._fixed[pair.a], self._fixed[pair.b], pair.scaling),
            replies=[self._factors(pair, reply) for reply in replies],
            shares=[reply.weight / total for reply in replies],
            residual=residuals.get(module),
            fresh_a=lambda: self._fresh(pair.a),
            residual_rank=self._run.federation.residual_rank,
        )

    def _factors(self, pair: Pair, reply: _Reply) -> LoraFactors:
        """A client's factors, whole, float64."""
        a, b = (
            self._fixed[name].astype(np.float64) + reply.arrays.get(name, np.float32(0.0))
            for name in (pair.a, pair.b)
        )
        return LoraFactors(a, b, pair.scaling)

    def _enter(self, change: Wide, pair: Pair, made: Combined) -> None:
        for name, array in ((pair.a, made.factors.a), (pair.b, made.factors.b)):
            change[name] = array.astype(np.float64) - self._state[name]

    def _fresh(self, name: str) -> NDArray[np.float32]:
        """A as `peft` draws it, uniform within 1 / sqrt(n), anew in each round."""
        shape = self._state[name].shape
        rng = stream(self._run.run.seed, "flora", name, self._number)
        return rng.uniform(-1.0, 1.0, size=shape).astype(np.float32) / np.float32(np.sqrt(shape[1]))

    def _aggregation(
        self, distances: Mapping[str, Distance], residuals: Mapping[str, LoraFactors]
    ) -> Aggregation | None:
        if not distances:
            return None
        worst = max(sorted(distances), key=lambda module: distances[module].relative)
        whole = together(distances.values())
        return Aggregation(
            rule=str(self._run.federation.lora_rule),
            error=whole.relative,
            worst=distances[worst].relative,
            worst_module=worst,
            norm=whole.exact,
            residual_rank=max((factors.rank for factors in residuals.values()), default=0),
        )


def get_measurement(aggregator: Any) -> Aggregation | None:
    """What an aggregator measured when it was closed; None if it doesn't measure."""
    return aggregator.measured if isinstance(aggregator, FactorAggregator) else None
