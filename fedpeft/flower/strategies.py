"""Flower's strategies by name, called from our own round loop on deltas.

Flower's `Strategy.start` replaces the weights by the aggregate and can't be resumed. So each round anchors
the strategy at zero: `configure_train` is told that the current arrays are zeros, the replies are deltas, and
what `aggregate_train` returns is the change to apply. This equals the strategy's own arithmetic on weights up
to float rounding.

Rules of the mean type get one reply, the exact mean of all (`ExactSum`), and need memory for one update. They
act on each entry by itself, so that reply is one long array. The others get every reply, sorted by client and
copied, since several of them empty the records they are given.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from numpy.typing import NDArray

from fedpeft.aggregation import ExactSum
from fedpeft.config import RunConfig, StrategySection
from fedpeft.errors import FederationError, RunFileError
from fedpeft.flower.identity import ensure_identity
from fedpeft.options import unknown_name
from fedpeft.packed import PackedArrays, Packing, packable
from fedpeft.update import Arrays, Layout, Update

logging.getLogger("flwr").setLevel(logging.WARNING)  # strategies log every call at INFO

_LOSS_KEY = "train_loss"  # QFedAvg's default name for it
_ALL = "update"  # the name of the one array that rules of the mean type are given


@dataclass(frozen=True)
class Rule:
    """What must be known of a strategy to call it.

    Attributes:
        build: the strategy's class.
        folds: it is a function of the weighted mean alone, so replies can be folded as they arrive.
        memory: attributes that it keeps from round to round, as dicts or lists of arrays; part of a
            checkpoint.
        needs: fewest replies for its guarantee to hold, given its options.
        summary: one line for people.
    """

    build: type[flower.FedAvg]
    folds: bool
    summary: str
    memory: tuple[str, ...] = ()
    needs: Callable[[Mapping[str, Any]], int] = lambda options: 1


def _malicious(options: Mapping[str, Any]) -> int:
    return int(options.get("num_malicious_nodes", 0))


RULES: dict[str, Rule] = {
    "fedavg": Rule(flower.FedAvg, True, "weighted mean (McMahan et al. 2017)"),
    "fedprox": Rule(
        flower.FedProx, True, "weighted mean, clients pulled to the global state (Li et al. 2020)"
    ),
    "fedavgm": Rule(
        flower.FedAvgM, True, "weighted mean with server momentum (Hsu et al. 2019)", ("momentum_vector",)
    ),
    "fedadam": Rule(flower.FedAdam, True, "Adam on the mean change (Reddi et al. 2021)", ("m_t", "v_t")),
    "fedyogi": Rule(flower.FedYogi, True, "Yogi on the mean change (Reddi et al. 2021)", ("m_t", "v_t")),
    "fedadagrad": Rule(
        flower.FedAdagrad, True, "Adagrad on the mean change (Reddi et al. 2021)", ("m_t", "v_t")
    ),
    "krum": Rule(
        flower.Krum,
        False,
        "the update nearest to its neighbours (Blanchard et al. 2017)",
        needs=lambda o: 2 * _malicious(o) + 3,
    ),
    "multikrum": Rule(
        flower.MultiKrum,
        False,
        "mean of the best Krum scores (Blanchard et al. 2017)",
        needs=lambda o: 2 * _malicious(o) + 3,
    ),
    "bulyan": Rule(
        flower.Bulyan,
        False,
        "trimmed mean of Krum selections (El Mhamdi et al. 2018)",
        needs=lambda o: 4 * _malicious(o) + 3,
    ),
    "fedmedian": Rule(flower.FedMedian, False, "coordinate-wise median (Yin et al. 2018)"),
    "fedtrimmedavg": Rule(flower.FedTrimmedAvg, False, "coordinate-wise trimmed mean (Yin et al. 2018)"),
    "qfedavg": Rule(flower.QFedAvg, False, "mean weighted towards high losses (Li et al. 2020)"),
}

_PLUMBING = set(inspect.signature(flower.FedAvg.__init__).parameters) | {"train_loss_key", "selection_rule"}


def strategy_problems(section: StrategySection, cohort: int) -> list[str]:
    """What is wrong with the strategy of a run file, given the expected cohort."""
    rule = RULES.get(section.kind)
    if rule is None:
        return [unknown_name("federation.strategy", section.kind, RULES)]
    signature = inspect.signature(rule.build.__init__).parameters
    known = set(signature) - _PLUMBING
    problems = [
        f"federation.strategy.{key}: {section.kind} has no such option;"
        f" it takes {', '.join(sorted(known)) or 'none'}"
        for key in section.options
        if key not in known
    ]
    problems += [
        f"federation.strategy.{key}: {section.kind} needs it; give a number"
        for key in sorted(known - set(section.options))
        if signature[key].default is inspect.Parameter.empty
    ]
    for key, value in section.options.items():
        if key in known and (isinstance(value, bool) or not isinstance(value, int | float)):
            problems.append(f"federation.strategy.{key}: a number is needed, got {value!r}")
    if not problems and cohort < rule.needs(section.options):
        problems.append(
            f"federation.strategy: {section.kind} with num_malicious_nodes = {_malicious(section.options)}"
            " needs"
            f" {rule.needs(section.options)} clients a round, the cohort is {cohort}"
        )
    return problems


def proximal_mu(section: StrategySection) -> float:
    """FedProx's coefficient, which acts at the client; 0 for other strategies."""
    return float(section.options.get("proximal_mu", 0.0)) if section.kind == "fedprox" else 0.0


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
        self.layout: Layout = Packing(layout) if packable(layout) else layout
        self._quantum = run.federation.quantum_exponent
        self._strategy = self.rule.build(
            min_train_nodes=0, min_evaluate_nodes=0, min_available_nodes=0, **section.options
        )

    def begin(self, round_: int, capacity: int) -> Aggregator:
        """Start a round in which at most `capacity` updates will be counted."""
        exact = ExactSum(self.layout, quantum_exponent=self._quantum, capacity=capacity)
        return _Folding(self, round_, exact) if self.rule.folds else _Gathering(self, round_, exact)

    @property
    def _shown(self) -> Layout:
        """The arrays that the strategy sees."""
        if not self.rule.folds:
            return self.layout
        return {_ALL: ((sum(math.prod(shape) for shape, _ in self.layout.values()),), "<f8")}

    def aggregate_mean(self, round_: int, mean: PackedArrays, weight: int) -> Arrays:
        """Call a rule of the mean type with the one reply that it needs."""
        result = self.aggregate(round_, [({_ALL: mean.flat}, weight, 0.0)])
        return PackedArrays(result[_ALL], mean.packing)

    def aggregate(
        self, round_: int, replies: Sequence[tuple[Arrays, int, float]]
    ) -> dict[str, NDArray[np.float64]]:
        """Call the strategy, anchored at zero; see the module.

        Args:
            replies: (arrays, weight, training loss), in client order.
        """
        needed = self.rule.needs(self._options)
        if not self.rule.folds and len(replies) < needed:
            raise FederationError(
                f"round {round_}: {self._name} needs {needed} updates and {len(replies)} came; lower"
                " num_malicious_nodes,"
                " or ask more clients"
            )
        zeros = {name: np.zeros(shape, dtype=np.float64) for name, (shape, _) in self._shown.items()}
        if hasattr(self._strategy, "current_arrays"):
            self._strategy.current_arrays = None  # else FedAvgM would stay anchored at its own last output
        self._strategy.configure_train(round_, _record(zeros), ConfigRecord(), _NO_GRID)
        result, _ = self._strategy.aggregate_train(round_, [_reply(*reply) for reply in replies])
        if result is None:
            raise FederationError(f"round {round_}: {self._name} returned nothing for {len(replies)} updates")
        return {name: array.numpy().astype(np.float64) for name, array in result.items()}

    def memory(self) -> dict[str, NDArray[Any]]:
        """What the strategy carries to the next round, as named arrays for a checkpoint."""
        kept = {}
        for attribute in self.rule.memory:
            value = getattr(self._strategy, attribute)
            if value is not None:
                named = (
                    value.items() if isinstance(value, dict) else zip(sorted(self._shown), value, strict=True)
                )
                kept.update({f"{attribute}/{name}": np.asarray(array) for name, array in named})
        return kept

    def restore(self, memory: Mapping[str, NDArray[Any]]) -> None:
        """Inverse of `memory`, after a restart."""
        for attribute in self.rule.memory:
            named = {
                name: memory[f"{attribute}/{name}"]
                for name in sorted(self._shown)
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
        replies = [(update.arrays, update.weight, update.metrics.get("loss", 0.0)) for update in ordered]
        return self._runner.aggregate(self._round, replies)


def _reply(arrays: Arrays, weight: int, loss: float) -> Message:
    metrics = MetricRecord({"num-examples": weight, _LOSS_KEY: loss})
    return Message(RecordDict({"arrays": _record(arrays), "metrics": metrics}), 1, "train")


def _record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.ascontiguousarray(arrays[name])) for name in sorted(arrays)})


class _NoGrid(Grid):
    """The grid a strategy is shown: it has no nodes, as cohorts are sampled by our own loop."""

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return []

    def push_messages(self, messages: Any) -> list[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Any) -> list[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        raise NotImplementedError


_NO_GRID = _NoGrid()
