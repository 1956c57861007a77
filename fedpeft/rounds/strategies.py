"""The strategies of `fedpeft.rounds.strategy_table`, called from our own round loop on deltas.

Flower's `Strategy.start` replaces the weights by the aggregate and can't be resumed. So each round anchors
the strategy at zero: `configure_train` is told that the current arrays are zeros, the replies are deltas, and
what `aggregate_train` returns is the change to apply. This equals the strategy's own arithmetic on weights up
to float rounding.

Rules of the mean type get one reply, the exact mean of all (`ExactSum`), and need memory for one update. They
act on each entry by itself, so that reply is one long array. The others get every reply, sorted by client and
copied, since several of them empty the records they are given.

Robust rules work on LoRA's products where both factors travel (`fedpeft.aggregation.robust`). Those that are
functions of
norms and distances are ours there, since Flower's know entries only. Those that look at single entries are
Flower's, on factors in the one form that each product has.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from numpy.typing import NDArray

from fedpeft.aggregation.exact_sum import ExactSum
from fedpeft.aggregation.robust import Entries, Geometry, Products, krum_selection, lora_pairs
from fedpeft.config.sections import RunConfig
from fedpeft.errors import FederationError, RunFileError
from fedpeft.rounds.strategy_table import RULES, prefers_products, strategy_problems
from fedpeft.transport.array_bytes import array_of, values_of
from fedpeft.transport.node_identity import ensure_identity
from fedpeft.transport.polled_grid import PolledGrid
from fedpeft.updates.packed import PackedArrays, packable, packing_of
from fedpeft.updates.update import Arrays, Layout, Update

logging.getLogger("flwr").setLevel(logging.WARNING)  # strategies log every call at INFO

_LOSS_KEY = "train_loss"  # QFedAvg's default name for it
_ALL = "update"  # the name of the one array that rules of the mean type are given


class Aggregator(Protocol):
    """One round's replies becoming one change."""

    @property
    def layout(self) -> Layout:
        """What an update must look like."""
        ...

    def fold(self, client: str, update: Update) -> float:
        """Count one update; returns its L2 norm.

        Raises:
            UpdateError: it must not be counted; nothing of it was.
        """
        ...

    def close(self) -> Arrays:
        """The change to apply, float64.

        Raises:
            FederationError: too few replies for the rule.
        """
        ...


class StrategyRunner:
    """One strategy over the rounds of a run.

    Raises:
        RunFileError: unknown strategy or options.
    """

    def __init__(self, run: RunConfig, layout: Layout, cohort: int) -> None:
        section = run.federation.strategy
        problems = strategy_problems(section, cohort)
        if problems:
            raise RunFileError("run file", problems)
        ensure_identity()
        self.rule = RULES[section.kind]
        self._options = section.options
        self._name = section.kind
        self.layout: Layout = packing_of(layout) if packable(layout) else layout
        self._quantum = run.federation.quantum_exponent
        self._strategy = None if self.rule.build is None else self._flowers(self.rule.build)
        self._made: Any = None if self.rule.made is None else self.rule.made(**self._options)
        self._pairs = lora_pairs(self.layout, run.peft) if prefers_products(section) else ()
        if section.geometry == "product" and not self._pairs:
            raise RunFileError(
                "run file",
                ["federation.strategy.geometry: no two factors of a product travel here; use 'entries'"],
            )
        self._state: Arrays = {}

    @property
    def geometry(self) -> str:
        """What a robust rule measures; empty for others."""
        return ("product" if self._pairs else "entries") if self.rule.robust else ""

    def _flowers(self, build: type[flower.FedAvg], **further: Any) -> flower.FedAvg:
        """One of Flower's, which samples nobody."""
        return build(
            min_train_nodes=0, min_evaluate_nodes=0, min_available_nodes=0, **self._options, **further
        )

    def start_from(self, state: Arrays) -> None:
        """Note the state that the coming round's updates are changes of; products are made with it."""
        self._state = state

    def begin(self, round_: int, capacity: int) -> Aggregator:
        """Start a round in which at most `capacity` updates will be counted."""
        exact = ExactSum(self.layout, quantum_exponent=self._quantum, capacity=capacity)
        return _Folding(self, round_, exact) if self.rule.folds else _Gathering(self, round_, exact)

    @functools.cached_property
    def _zeros(self) -> Mapping[str, Array]:
        """What the strategy is anchored at."""
        return {name: array_of(np.zeros(shape)) for name, (shape, _) in sorted(self._visible_layout.items())}

    @property
    def _visible_layout(self) -> Layout:
        """The arrays that the strategy sees."""
        if not self.rule.folds:
            return self.layout
        return {_ALL: ((sum(math.prod(shape) for shape, _ in self.layout.values()),), "<f8")}

    def aggregate_mean(self, round_: int, mean: PackedArrays, weight: int) -> Arrays:
        """Call a rule of the mean type with the one reply that it needs."""
        if self._made is not None:
            return self._apply_change(round_, self._made.step(round_, dict(mean)))
        result = self.aggregate(round_, [({_ALL: mean.flat}, weight, 0.0)])
        return PackedArrays(result[_ALL], mean.packing)

    def aggregate_all(self, round_: int, updates: Sequence[Update]) -> Arrays:
        """Call a rule that needs all updates, in client order.

        Raises:
            FederationError: they are too few for it.
        """
        needed = self.rule.needs(self._options)
        if len(updates) < needed:
            raise FederationError(
                f"round {round_}: {self._name} needs {needed} updates and {len(updates)} came; lower"
                " num_malicious_nodes,"
                " or ask more clients"
            )
        if self._made is not None:
            return self._apply_change(round_, self._made.combine(round_, list(updates)))
        if self._pairs:
            return self._aggregate_products(round_, updates, Products(self._pairs, self._state))
        if self._strategy is None:
            return self._weigh(updates, Entries())
        return self.aggregate(round_, [_as_flower_reply(update, update.arrays) for update in updates])

    def _apply_change(self, round_: int, change: Any) -> Arrays:
        """What a plugin's strategy returned, if it is a change of the run's arrays.

        Raises:
            FederationError: it isn't.
        """
        if not isinstance(change, Mapping) or set(change) != set(self.layout):
            raise FederationError(
                f"round {round_}: {self._name} returned no array for each of {len(self.layout)} names"
            )
        arrays = {name: np.asarray(change[name], dtype=np.float64) for name in self.layout}
        for name, (shape, _) in self.layout.items():
            if arrays[name].shape != tuple(shape) or not np.isfinite(arrays[name]).all():
                raise FederationError(
                    f"round {round_}: {self._name} returned {name} of shape {list(arrays[name].shape)};"
                    f" finite numbers of shape {list(shape)} are needed"
                )
        return arrays

    def _weigh(self, updates: Sequence[Update], geometry: Geometry) -> Arrays:
        """A rule of inner products."""
        if self.rule.coefficients is None:
            raise FederationError(f"{self._name} is no rule of inner products")
        arrays = [update.arrays for update in updates]
        weights = np.array([update.weight for update in updates], dtype=np.float64)
        gram = geometry.gram(arrays)
        return geometry.combine(
            arrays, self.rule.coefficients(gram, weights / weights.sum(), **self._options)
        )

    def _aggregate_products(self, round_: int, updates: Sequence[Update], products: Products) -> Arrays:
        if self.rule.coefficients is not None:
            return self._weigh(updates, products)
        strategy = self._strategy
        if self.rule.build is flower.Bulyan:
            gram = products.gram([update.arrays for update in updates])

            def select(contents: list[RecordDict], malicious: int, count: int) -> list[RecordDict]:
                return [contents[place] for place in krum_selection(gram, count, malicious)]

            strategy = self._flowers(flower.Bulyan, selection_rule=select)
        replies = [_as_flower_reply(update, products.canonical(update.arrays)) for update in updates]
        return products.from_canonical(self.aggregate(round_, replies, strategy))

    def aggregate(
        self,
        round_: int,
        replies: Sequence[tuple[Arrays, int, float]],
        strategy: flower.FedAvg | None = None,
    ) -> dict[str, NDArray[np.float64]]:
        """Call one of Flower's strategies, anchored at zero; see the module.

        Args:
            replies: (arrays, weight, training loss), in client order.
            strategy: default the run's own.
        """
        strategy = self._strategy if strategy is None else strategy
        if strategy is None:
            raise FederationError(f"{self._name} is no strategy of Flower's")
        if hasattr(strategy, "current_arrays"):
            strategy.current_arrays = None  # else FedAvgM would stay anchored at its own last output
        strategy.configure_train(round_, ArrayRecord(dict(self._zeros)), ConfigRecord(), _NO_GRID)
        with _quick_collections() if self.rule.collects else contextlib.nullcontext():
            result, _ = strategy.aggregate_train(round_, [_reply(*reply) for reply in replies])
        if result is None:
            raise FederationError(f"round {round_}: {self._name} returned nothing for {len(replies)} updates")
        return {name: values_of(array).astype(np.float64, copy=False) for name, array in result.items()}

    def memory(self) -> dict[str, NDArray[Any]]:
        """What the strategy carries to the next round, as named arrays for a checkpoint."""
        if self._made is not None:
            return {f"state/{name}": np.asarray(array) for name, array in self._made.state.items()}
        kept = {}
        for attribute in self.rule.memory:
            value = getattr(self._strategy, attribute)
            if value is not None:
                named = (
                    value.items()
                    if isinstance(value, dict)
                    else zip(sorted(self._visible_layout), value, strict=True)
                )
                kept.update({f"{attribute}/{name}": np.asarray(array) for name, array in named})
        return kept

    def restore(self, memory: Mapping[str, NDArray[Any]]) -> None:
        """Inverse of `memory`, after a restart."""
        if self._made is not None:
            self._made.state = {name.removeprefix("state/"): array for name, array in memory.items()}
        for attribute in self.rule.memory:
            named = {
                name: memory[f"{attribute}/{name}"]
                for name in sorted(self._visible_layout)
                if f"{attribute}/{name}" in memory
            }
            if named:
                listed = attribute == "momentum_vector"
                setattr(self._strategy, attribute, list(named.values()) if listed else named)


class _Folding:
    """Mean-type rules: an exact sum as replies arrive, one pre-folded reply at the end."""

    def __init__(self, runner: StrategyRunner, round_: int, sum_: ExactSum) -> None:
        self._runner, self._round, self._sum = runner, round_, sum_
        self.layout = runner.layout

    def fold(self, client: str, update: Update) -> float:
        return self._sum.fold(update, who=client)

    def close(self) -> Arrays:
        return self._runner.aggregate_mean(self._round, self._sum.mean(), self._sum.total_weight)


class _Gathering:
    """Rules that compare updates: all of them, in client order; the exact sum only checks them."""

    def __init__(self, runner: StrategyRunner, round_: int, checks: ExactSum) -> None:
        self._runner, self._round, self._checks = runner, round_, checks
        self.layout = runner.layout
        self._updates: dict[str, Update] = {}

    def fold(self, client: str, update: Update) -> float:
        norm = self._checks.fold(update, who=client)
        self._updates[client] = update
        return norm

    def close(self) -> Arrays:
        ordered = [self._updates[client] for client in sorted(self._updates)]
        return self._runner.aggregate_all(self._round, ordered)


@contextlib.contextmanager
def _quick_collections() -> Iterator[None]:
    """Leave what is there already out of garbage collections.

    For rules that collect garbage after each client, which goes through every object of every library that
    is loaded: half a second each time, beside a model.
    """
    if gc.get_freeze_count():  # left out already, to be shared with worker processes
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _as_flower_reply(update: Update, arrays: Arrays) -> tuple[Arrays, int, float]:
    """What Flower is told of an update."""
    return arrays, update.weight, update.metrics.get("loss", 0.0)


def _reply(arrays: Arrays, weight: int, loss: float) -> Message:
    metrics = MetricRecord({"num-examples": weight, _LOSS_KEY: loss})
    return Message(RecordDict({"arrays": _record(arrays), "metrics": metrics}), 1, "train")


def _record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: array_of(np.ascontiguousarray(arrays[name])) for name in sorted(arrays)})


class _NoGrid(PolledGrid):
    """The grid a strategy is shown: it has no nodes, as cohorts are sampled by our own loop."""

    def get_node_ids(self) -> list[int]:
        return []

    def push_messages(self, messages: Any) -> list[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Any) -> list[Message]:
        raise NotImplementedError


_NO_GRID = _NoGrid()
