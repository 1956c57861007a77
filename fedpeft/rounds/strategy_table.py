"""The aggregation rules by name: Flower's strategies, and of ours what Flower has not."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from flwr.serverapp import strategy as flower
from numpy.typing import NDArray

from fedpeft.aggregation.robust import Coefficients, geometric_median, krum, multikrum, norm_bound
from fedpeft.config.option_tables import unknown_name
from fedpeft.config.sections import PeftSection, RunConfig, StrategySection
from fedpeft.config.traits import NO_TRAITS, Trait, Traits, choose_traits
from fedpeft.errors import MissingExtraError
from fedpeft.models.methods import METHODS
from fedpeft.plugins import EntryTable
from fedpeft.spaces import space_traits


class Strategy(Protocol):
    """An aggregation rule of another package; it need not inherit from anything.

    The class takes its options, which are numbers, by name alone. Its docstring's first line is shown to
    people. Beside these methods it has one more, which says what it needs of a round:

    * ``step(number, mean)``: the change to apply, from the exact weighted mean of the updates, or
    * ``combine(number, updates)``: the change, from all updates (`fedpeft.Update`) in the order of their
      clients' names; so all of them are held until the round ends.

    Both take and return float64 arrays by name, laid out as updates are.

    Attributes:
        traits: what it is, of `fedpeft.Trait`; that decides which runs it can be part of.
        state: what it carries from round to round, by name; read for each checkpoint, and set after a
            restart. Empty before the first round. With one, `traits` has REMEMBERS_STEPS.
    """

    traits: ClassVar[Traits]
    state: dict[str, NDArray[Any]]


@dataclass(frozen=True)
class StrategyRule:
    """What must be known of a rule to call it.

    Attributes:
        build: Flower's class; None: the rule is ours.
        folds: it is a function of the weighted mean alone, so replies can be folded as they arrive.
        memory: attributes that it keeps from round to round, as dicts or lists of arrays; part of a
            checkpoint.
        needs: fewest replies for its guarantee to hold, given its options.
        coefficients: the rule as a function of inner products; None: it looks at entries.
        collects: Flower's class collects garbage after each client.
        robust: hostile clients, some of them, are what it is for; so it has a geometry.
        declares: what else decides which runs it can be part of.
        made: of another package: a class that is a `Strategy`.
        summary: one line for people.
    """

    build: type[flower.FedAvg] | None
    folds: bool
    summary: str
    memory: tuple[str, ...] = ()
    needs: Callable[[Mapping[str, Any]], int] = lambda options: 1
    coefficients: Coefficients | None = None
    collects: bool = False
    robust: bool = False
    declares: Traits = frozenset({Trait.STEP_IS_NOT_THE_MEAN})
    made: Callable[..., Strategy] | None = None

    @property
    def traits(self) -> Traits:
        """What it is, as `fedpeft.compatibility` asks."""
        told = {Trait.REMEMBERS_STEPS: bool(self.memory), Trait.NEEDS_EACH_UPDATE: not self.folds}
        return self.declares | choose_traits(told)

    def traits_with(self, options: Mapping[str, Any]) -> Traits:
        """What it is with its options."""
        eta = self.options.get("eta")
        step = options.get("eta", 1.0 if eta is None else eta.default)
        small = Trait.STEPS_BY_ETA in self.declares and isinstance(step, int | float) and step < 1
        return self.traits | choose_traits({Trait.STEPS_BELOW_ONE: small})

    @property
    def options(self) -> Mapping[str, inspect.Parameter]:
        """What it takes by name."""
        if self.build is not None:
            parameters = inspect.signature(self.build).parameters
            return {key: value for key, value in parameters.items() if key not in _PLUMBING}
        called = self.coefficients if self.made is None else self.made
        ours = inspect.signature(called).parameters if called is not None else {}
        return {key: value for key, value in ours.items() if value.kind is value.KEYWORD_ONLY}


_MOVES = frozenset({Trait.STEP_IS_NOT_THE_MEAN})
_ADAPTIVE = _MOVES | {Trait.STEPS_BY_ETA}
_COMPARES = _MOVES | {Trait.COMPARES_UPDATES}
_PLUMBING = set(inspect.signature(flower.FedAvg.__init__).parameters) | {"train_loss_key", "selection_rule"}


def malicious(options: Mapping[str, Any]) -> int:
    """How many hostile clients the options reckon with."""
    return int(options.get("num_malicious_nodes", 0))


_OWN: dict[str, StrategyRule] = {
    "fedavg": StrategyRule(flower.FedAvg, True, "weighted mean (McMahan et al. 2017)", declares=NO_TRAITS),
    "fedprox": StrategyRule(
        flower.FedProx,
        True,
        "weighted mean, clients pulled to the global state (Li et al. 2020)",
        declares=frozenset({Trait.PULLS_GRADIENTS}),
    ),
    "fedavgm": StrategyRule(
        flower.FedAvgM, True, "weighted mean with server momentum (Hsu et al. 2019)", ("momentum_vector",)
    ),
    "fedadam": StrategyRule(
        flower.FedAdam,
        True,
        "Adam on the mean change (Reddi et al. 2021)",
        ("m_t", "v_t"),
        declares=_ADAPTIVE,
    ),
    "fedyogi": StrategyRule(
        flower.FedYogi,
        True,
        "Yogi on the mean change (Reddi et al. 2021)",
        ("m_t", "v_t"),
        declares=_ADAPTIVE,
    ),
    "fedadagrad": StrategyRule(
        flower.FedAdagrad,
        True,
        "Adagrad on the mean change (Reddi et al. 2021)",
        ("m_t", "v_t"),
        declares=_ADAPTIVE,
    ),
    "krum": StrategyRule(
        flower.Krum,
        False,
        "the update nearest to its neighbours (Blanchard et al. 2017)",
        needs=lambda o: 2 * malicious(o) + 3,
        coefficients=krum,
        robust=True,
        declares=_COMPARES,
    ),
    "multikrum": StrategyRule(
        flower.MultiKrum,
        False,
        "mean of the best Krum scores (Blanchard et al. 2017)",
        needs=lambda o: 2 * malicious(o) + 3,
        coefficients=multikrum,
        robust=True,
        declares=_COMPARES,
    ),
    "bulyan": StrategyRule(
        flower.Bulyan,
        False,
        "trimmed mean of Krum selections (El Mhamdi et al. 2018)",
        needs=lambda o: 4 * malicious(o) + 3,
        collects=True,
        robust=True,
        declares=_COMPARES,
    ),
    "fedmedian": StrategyRule(
        flower.FedMedian,
        False,
        "coordinate-wise median (Yin et al. 2018)",
        robust=True,
        declares=_COMPARES,
    ),
    "fedtrimmedavg": StrategyRule(
        flower.FedTrimmedAvg,
        False,
        "coordinate-wise trimmed mean (Yin et al. 2018)",
        robust=True,
        declares=_COMPARES,
    ),
    "norm-bound": StrategyRule(
        None,
        False,
        "mean of updates cut to clip_norm, or to the round's median norm (Sun et al. 2019)",
        coefficients=norm_bound,
        robust=True,
    ),
    "geometric-median": StrategyRule(
        None,
        False,
        "the point nearest to all updates (Pillutla et al. 2022, RFA)",
        coefficients=geometric_median,
        robust=True,
        declares=_COMPARES,
    ),
    "qfedavg": StrategyRule(
        flower.QFedAvg,
        False,
        "mean weighted towards high losses (Li et al. 2020)",
        collects=True,
        declares=_MOVES | {Trait.SCALES_BY_LOSS},
    ),
}


def _rule_of(name: str, offered: Any) -> StrategyRule:
    """The rule that a plugin's strategy is.

    Raises:
        MissingExtraError: it is none.
    """
    if isinstance(offered, StrategyRule):
        return offered
    needs_each = hasattr(offered, "combine")
    if not callable(offered) or needs_each == hasattr(offered, "step") or not hasattr(offered, "traits"):
        raise MissingExtraError(
            f"the plugin '{name}' is no strategy: it needs traits, and either step or combine; see"
            " fedpeft.Strategy"
        )
    summary = (offered.__doc__ or name).strip().partition("\n")[0].rstrip(".")
    return StrategyRule(None, not needs_each, summary, declares=frozenset(offered.traits), made=offered)


RULES = EntryTable("strategies", _OWN, _rule_of)

_POSITIVE = ("clip_norm", "multiple")


def strategy_problems(section: StrategySection, cohort: int) -> list[str]:
    """What is wrong with the strategy of a run file, given the expected cohort."""
    rule = RULES.get(section.kind)
    if rule is None:
        return [unknown_name("federation.strategy", section.kind, RULES)]
    known = rule.options
    problems = [
        f"federation.strategy.{key}: {section.kind} has no such option;"
        f" it takes {', '.join(sorted(known)) or 'none'}"
        for key in section.options
        if key not in known
    ]
    problems += [
        f"federation.strategy.{key}: {section.kind} needs it; give a number"
        for key in sorted(known.keys() - set(section.options))
        if known[key].default is inspect.Parameter.empty
    ]
    for key, value in section.options.items():
        if key in known and (isinstance(value, bool) or not isinstance(value, int | float)):
            problems.append(f"federation.strategy.{key}: a number is needed, got {value!r}")
        elif key in known and key in _POSITIVE and not 0 < value < math.inf:
            problems.append(f"federation.strategy.{key}: a number above 0 is needed, got {value!r}")
    if section.geometry is not None and not rule.robust:
        problems.append(
            f"federation.strategy.geometry: {section.kind} compares no updates; remove it, or use one of"
            f" {', '.join(name for name, known_rule in RULES.items() if known_rule.robust)}"
        )
    if not problems and cohort < rule.needs(section.options):
        problems.append(
            f"federation.strategy: {section.kind} with num_malicious_nodes = {malicious(section.options)}"
            " needs"
            f" {rule.needs(section.options)} clients a round, the cohort is {cohort}"
        )
    return problems


def prefers_products(section: StrategySection) -> bool:
    """Whether a rule works on products where there are any: if said so, else those that measure distances.

    A product's factors in their common form turn with a client's data, so that the entries of two clients do
    not mean the same: rules per entry do worse on them than on factors as they come.
    """
    rule = RULES[section.kind]
    if section.geometry is not None:
        return section.geometry == "product"
    return rule.robust and rule.coefficients is not None


def geometry_problems(run: RunConfig) -> list[str]:
    """What stands against the geometry of a run's strategy."""
    section = run.federation.strategy
    if section.geometry != "product" or has_products(run.peft, run.space.kind):
        return []
    return [
        "federation.strategy.geometry: 'product' is for methods that train both of LoRA's factors, in space"
        f" 'adapter-delta', and this run has {run.peft.method} in {run.space.kind}; use 'entries'"
    ]


def geometry_of(run: RunConfig) -> str:
    """What a run's rule will measure, as far as the run file tells; empty where it compares nothing."""
    section = run.federation.strategy
    rule = RULES.get(section.kind)
    if rule is None or not rule.robust:
        return ""
    products = has_products(run.peft, run.space.kind) and prefers_products(section)
    return section.geometry or ("product" if products else "entries")


def has_products(peft: PeftSection, space: str) -> bool:
    """Whether updates are made of LoRA's factors, both of them."""
    method = METHODS.get(peft.method)
    both = method is not None and method.config == "LoraConfig" and method.trained == "adapter"
    return both and Trait.SENDS_ENTRIES in space_traits(space)


def proximal_mu(section: StrategySection) -> float:
    """FedProx's coefficient, which acts at the client; 0 for strategies that don't pull on gradients."""
    rule = RULES.get(section.kind)
    pulls = rule is not None and Trait.PULLS_GRADIENTS in rule.traits
    return float(section.options.get("proximal_mu", 0.0)) if pulls else 0.0
