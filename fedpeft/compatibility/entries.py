"""What a run is made of: its entries, each with its key in the run file and what it declares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedpeft.aggregation.lora_rules import LORA_RULES
from fedpeft.attacks import attack_traits, build_attack
from fedpeft.config.option_tables import build_option
from fedpeft.config.sections import RunConfig, StageSection
from fedpeft.config.traits import Trait, Traits, choose_traits
from fedpeft.errors import RunFileError
from fedpeft.models.methods import METHODS, STARTS_FROM_WEIGHTS
from fedpeft.models.offsite import emulator_at
from fedpeft.privacy.kinds import KINDS
from fedpeft.rounds.strategy_table import RULES, has_products, prefers_products
from fedpeft.spaces import space_options
from fedpeft.stages import STAGES, stage_traits
from fedpeft.training.zeroth_rules import RULES as ZEROTH_RULES


@dataclass(frozen=True)
class Entry:
    """One thing that a run is made of.

    Attributes:
        key: in the run file; conflicts are reported under it.
        name: as a conflict's reason says it.
        traits: what it declares.
        table: the key of the table that it is from, where its alternatives are; empty: none.
        why: what it adds of itself to a reason.
    """

    key: str
    name: str
    traits: Traits
    table: str = ""
    why: str = ""


_TRAINERS: Mapping[str, Traits] = {
    "first-order": frozenset({Trait.DENSE_MOVES}),
    "zeroth-order": frozenset({Trait.DIRECTIONAL_MOVES}),
    "none": frozenset({Trait.NO_TRAINING}),
}

_TABLES: Mapping[str, Callable[[], Mapping[str, Traits]]] = {
    "federation.strategy": lambda: {name: rule.traits for name, rule in RULES.items()},
    "federation.lora_rule": lambda: {name: rule.traits for name, rule in LORA_RULES.items()},
    "peft.method": lambda: {name: method.traits for name, method in METHODS.items()},
    "training.rule": lambda: {name: rule.traits for name, rule in sorted(ZEROTH_RULES.items())},
}


def tables(key: str) -> Mapping[str, Traits]:
    """Return the names of a table and what each declares; nothing where no table has the key."""
    return _TABLES[key]() if key in _TABLES else {}


def names_declaring(trait: Trait) -> list[str]:
    """Return the names of all tables that declare a trait."""
    return [name for table in _TABLES.values() for name, traits in table().items() if trait in traits]


def entries_of(run: RunConfig) -> tuple[Entry, ...]:
    """Return what a run is made of; names that there are not, and options that are wrong, are left out."""
    parts = (
        _strategy,
        _lora_rule,
        _adapter,
        _base,
        _space,
        _training,
        _stages,
        _federation,
        _others,
        _groups,
    )
    return tuple(entry for part in parts for entry in part(run))


def _strategy(run: RunConfig) -> Iterator[Entry]:
    section = run.federation.strategy
    rule = RULES.get(section.kind)
    if rule is None:
        return
    products = has_products(run.peft, run.space.kind) and prefers_products(section)
    traits = rule.traits_with(section.options) | choose_traits({Trait.WORKS_ON_PRODUCTS: products})
    yield Entry("federation.strategy", section.kind, traits, "federation.strategy")


def _lora_rule(run: RunConfig) -> Iterator[Entry]:
    name = run.federation.lora_rule
    if name is not None and name in LORA_RULES:
        yield Entry("federation.lora_rule", name, LORA_RULES[name].traits, "federation.lora_rule")


def _adapter(run: RunConfig) -> Iterator[Entry]:
    method, options = METHODS.get(run.peft.method), run.peft.options
    if method is not None:
        yield Entry("peft.method", method.name, method.traits, "peft.method")
    start = options.get("init_lora_weights")
    if isinstance(start, str) and start in STARTS_FROM_WEIGHTS:
        yield Entry("peft.init_lora_weights", start, frozenset({Trait.STARTS_FROM_WEIGHTS}))
    for key in ("rank_pattern", "alpha_pattern"):
        if options.get(key):
            yield Entry(f"peft.{key}", key, frozenset({Trait.VARIES_RANKS}))


def _base(run: RunConfig) -> Iterator[Entry]:
    model = run.model
    yield Entry(
        "model.task", model.task, choose_traits({Trait.HAS_CLASSES: model.task == "sequence-classification"})
    )
    if model.quantization != "none":
        yield Entry("model.quantization", model.quantization, frozenset({Trait.QUANTISED_BASE}))
    folder = Path(model.path).expanduser()
    if folder.is_dir() and emulator_at(folder) is not None:
        yield Entry("model.path", model.path, frozenset({Trait.EMULATED_BASE}))


def _space(run: RunConfig) -> Iterator[Entry]:
    try:
        options = space_options(run.space)
    except RunFileError:
        return
    yield Entry("space", getattr(options, "mode", options.kind), options.traits)


def _training(run: RunConfig) -> Iterator[Entry]:
    training = run.training
    yield Entry("training.kind", training.kind, _TRAINERS[training.kind])
    rule = ZEROTH_RULES.get(training.rule)
    if training.kind == "zeroth-order" and rule is not None:
        yield Entry("training.rule", training.rule, rule.traits, "training.rule", rule.hindrance)
    if training.fused_update:
        yield Entry("training.fused_update", "fused_update", frozenset({Trait.DROPS_GRADIENTS}))


def _stages(run: RunConfig) -> Iterator[Entry]:
    for place, section in enumerate(run.stages):
        yield from _stage(f"stages.{place} ({section.kind})", section)
    if run.downlink is not None:
        yield Entry("downlink", run.downlink.kind, frozenset({Trait.COMPRESSES_STATES}))


def _stage(key: str, section: StageSection) -> Iterator[Entry]:
    try:
        stage = build_option(key, STAGES, section.kind, section.options)
    except RunFileError:
        return
    yield Entry(key, section.kind, stage_traits(stage))


def _federation(run: RunConfig) -> Iterator[Entry]:
    federation = run.federation
    told: Mapping[str, tuple[bool, Trait]] = {
        "mode": (federation.mode == "buffered", Trait.SEVERAL_STARTS),
        "sampling": (federation.sampling.kind != "all", Trait.DRAWS_COHORTS),
        "over_selection": (federation.over_selection > 0, Trait.ASKS_IN_RESERVE),
        "self_pruning": (federation.self_pruning is not None, Trait.SHRINKS_RANKS),
        "residual_rank": (federation.residual_rank is not None, Trait.CAPS_RESIDUAL),
    }
    for key, (there, trait) in told.items():
        if there:
            yield Entry(f"federation.{key}", key, frozenset({trait}))


def _others(run: RunConfig) -> Iterator[Entry]:
    try:
        attack = build_attack(run)
    except RunFileError:
        attack = None
    if attack is not None and run.federation.attack is not None:
        yield Entry("federation.attack", run.federation.attack.kind, attack_traits(attack))
    if run.privacy is not None:
        yield Entry("privacy", run.privacy.kind, KINDS[run.privacy.kind].traits)
    if run.evaluation.baselines:
        yield Entry("evaluation.baselines", "baselines", frozenset({Trait.TRAINS_BASELINES}))


def _groups(run: RunConfig) -> Iterator[Entry]:
    if run.groups:
        yield Entry("groups", "groups", frozenset({Trait.HAS_GROUPS}))
    for place, group in enumerate(run.groups):
        keys = [key for key in ("model", "peft", "trains") if getattr(group, key)]
        if keys:
            yield Entry(f"groups.{place}", " and ".join(keys), frozenset({Trait.DIFFERS_IN_FORM}))
        if group.trains:
            trained = _TRAINERS[run.of_group(group).training.kind] & {Trait.DIRECTIONAL_MOVES}
            yield Entry(f"groups.{place}.trains", "trains", trained | {Trait.TRAINS_A_PART})
