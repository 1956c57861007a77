"""Which rules go with what: every combination that makes no sense, with the reason, known from the run file.

| rule           | ranks | strategies       | downlink | privacy              | trainers    |
|----------------|-------|------------------|----------|----------------------|-------------|
| fedit, ffa     | one   | all              | yes      | all                  | all         |
| rolora         | one   | without a memory | no       | all but record-level | first-order |
| fedsa          | one   | all              | no       | none                 | first-order |
| hetlora        | any   | fedavg, fedprox  | no       | record-level, local  | all         |
| flexlora       | any   | fedavg, fedprox  | no       | record-level, local  | all         |
| flora          | any   | fedavg, fedprox  | no       | record-level, local  | all         |
| exact-residual | any   | fedavg, fedprox  | no       | record-level, local  | all         |

All of them are for space 'adapter-delta' and synchronous rounds. Stages go with all: they act on what a
client sends, before the rule sees it.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

from fedpeft.config import ClientLevelPrivacy, GroupSection, RecordLevelPrivacy, RunConfig
from fedpeft.lora_rules.shares import rank_of, scaling_of
from fedpeft.lora_rules.table import LORA_RULES, LoraRule
from fedpeft.options import unknown_name

MEANS = frozenset({"fedavg", "fedprox"})
"""Strategies whose step is the mean itself."""

_OWN_START = ("pissa", "olora", "loftq", "eva", "corda", "orthogonal", "lora_ga")
_MODEL_KEYS = frozenset(
    {"quantization", "double_quantization", "compute_dtype", "group_size", "keep_modules", "dtype"}
)
_PEFT_KEYS = frozenset({"r", "lora_alpha"})
_PATTERNS = ("rank_pattern", "alpha_pattern")


def lora_problems(run: RunConfig, *, remembering: Set[str] = frozenset()) -> list[str]:
    """One line per reason why the rule, or the clients that differ, can't work.

    Args:
        remembering: strategies with a memory of their own.
    """
    problems = [*_idle(run), *_pruning(run), *_groups(run)]
    name = run.federation.lora_rule
    if name is None:
        return problems
    rule = LORA_RULES.get(name)
    if rule is None:
        return [*problems, unknown_name("federation.lora_rule", name, LORA_RULES)]
    problems += _method(run, name, rule)
    problems += _strategy(run, name, rule, remembering)
    problems += _privacy(run, name, rule)
    if run.downlink is not None and (rule.products or rule.keeps or rule.alternates):
        problems.append(
            f"downlink: under lora_rule '{name}' a round's step is no change of one set of entries, which is"
            " what it compresses; remove [downlink]"
        )
    if run.federation.mode == "buffered":
        problems.append(
            f"federation.mode: lora_rule '{name}' combines the factors of one round, and a buffer adds"
            " changes of several states; use mode 'synchronous'"
        )
    return problems


def _idle(run: RunConfig) -> Iterator[str]:
    """Keys that belong to another rule."""
    federation = run.federation
    rule = LORA_RULES.get(federation.lora_rule or "")
    if federation.residual_rank is not None and (rule is None or not rule.residual):
        takers = " and ".join(name for name, each in LORA_RULES.items() if each.residual)
        yield f"federation.residual_rank belongs to lora_rule {takers}; remove it"


def _pruning(run: RunConfig) -> Iterator[str]:
    """What stands against clients that give up ranks."""
    federation, training = run.federation, run.training
    if federation.self_pruning is None:
        return
    if federation.lora_rule != "hetlora":
        yield "federation.self_pruning belongs to lora_rule 'hetlora'; remove it, or set that rule"
    if training.kind != "first-order":
        yield "federation.self_pruning: only training.kind 'first-order' can shrink ranks; remove it"
    if training.fused_update:
        yield "training.fused_update: the penalty of self_pruning needs all gradients; remove one of the two"
    if run.privacy is not None:
        yield (
            "federation.self_pruning: which ranks a client gives up tells about its rows, and no noise hides"
            " it; remove it"
        )
    if federation.attack is not None:
        yield "federation.self_pruning: hostile clients remember no ranks; remove it, or the attack"


def _method(run: RunConfig, name: str, rule: LoraRule) -> Iterator[str]:
    method, options = run.peft.method, run.peft.options
    if method not in rule.methods:
        needed = " or ".join(f"'{each}'" for each in rule.methods)
        yield f"federation.lora_rule: '{name}' is for peft.method {needed}, and '{method}' came"
    if run.space.kind != "adapter-delta":
        yield (
            f"federation.lora_rule: '{name}' averages factors, and space '{run.space.kind}' sends scalars"
            " along directions; use space 'adapter-delta'"
        )
    for key in _PATTERNS:
        if options.get(key) and rule.products:
            yield f"peft.{key}: '{name}' takes one rank and one scaling for all modules; remove it"
    if rule.products and (options.get("init_lora_weights") or "") in _OWN_START:
        yield (
            f"peft.init_lora_weights: '{name}' makes new factors each round, which would undo a start of"
            f" '{options['init_lora_weights']}'; remove it"
        )
    if (rule.alternates or rule.keeps) and run.training.kind == "zeroth-order":
        yield f"training.kind: '{name}' treats A and B apart, and directions cover both; use 'first-order'"


def _strategy(run: RunConfig, name: str, rule: LoraRule, remembering: Set[str]) -> Iterator[str]:
    kind = run.federation.strategy.kind
    if rule.products and kind not in MEANS:
        yield (
            f"federation.strategy: lora_rule '{name}' makes the next factors from products, and {kind} from"
            " the factors' entries; use fedavg or fedprox, or lora_rule 'fedit'"
        )
    if rule.alternates and kind in remembering:
        yield (
            f"federation.strategy: {kind} remembers a step for each entry, and would move the factor that"
            f" rests under '{name}'; use fedavg or fedprox"
        )


def _privacy(run: RunConfig, name: str, rule: LoraRule) -> Iterator[str]:
    if isinstance(run.privacy, ClientLevelPrivacy) and rule.products:
        yield (
            f"federation.lora_rule: '{name}' needs each client's product, and client-level privacy releases a"
            " noised sum only; use 'ffa', 'rolora' or 'fedit'"
        )
    if isinstance(run.privacy, RecordLevelPrivacy) and rule.alternates:
        yield f"federation.lora_rule: '{name}' is not proven for record-level privacy; use 'ffa' or 'fedit'"
    if run.privacy is not None and rule.keeps:
        yield (
            f"federation.lora_rule: '{name}' lets clients keep parameters that no noise was added to; use"
            " 'ffa'"
        )


def _groups(run: RunConfig) -> Iterator[str]:
    for place, group in enumerate(run.groups):
        for problem in _group(run, group):
            yield f"groups.{place}.{problem}"


def _group(run: RunConfig, group: GroupSection) -> Iterator[str]:
    rule = LORA_RULES.get(run.federation.lora_rule or "")
    if not (group.own_model or group.trains):
        return
    if run.space.kind != "adapter-delta":
        yield (
            f"clients: models of several kinds have no common directions, which space '{run.space.kind}'"
            " needs; use space 'adapter-delta'"
        )
    for section, keys, allowed in (("model", group.model, _MODEL_KEYS), ("peft", group.peft, _PEFT_KEYS)):
        for key in sorted(keys.keys() - allowed):
            may = ", ".join(sorted(allowed))
            yield f"{section}.{key}: clients of one run share it; a group may set {may}"
    if run.downlink is not None:
        yield "clients: with [downlink] all hold the same state and base; remove one of the two"
    if run.federation.mode == "buffered":
        yield "clients: a buffer adds updates of one form; use federation.mode 'synchronous'"
    if run.federation.attack is not None:
        yield "clients: attacks are made for updates of one form; let all hold the same, or none attack"
    if (run.peft.options.get("init_lora_weights") or "") in _OWN_START or run.peft.method in _OWN_START:
        yield "model: factors that start from the base's weights differ with it; remove init_lora_weights"
    yield from _ranks(run, group, rule)
    if group.trains:
        yield from _trains(run, group)


def _ranks(run: RunConfig, group: GroupSection, rule: LoraRule | None) -> Iterator[str]:
    own = run.of_group(group)
    rank, whole = rank_of(own), rank_of(run)
    if rank > whole:
        yield f"peft.r: {rank} came and the run's adapter has {whole}; a group's rank is at most the run's"
    differs = rank != whole or scaling_of(own) != scaling_of(run)
    if differs and (rule is None or not rule.ranks):
        takers = ", ".join(name for name, each in LORA_RULES.items() if each.ranks)
        yield f"peft: ranks and scalings differ from the run's; set federation.lora_rule to one of {takers}"


def _trains(run: RunConfig, group: GroupSection) -> Iterator[str]:
    kind = run.federation.strategy.kind
    if kind not in MEANS:
        yield f"trains: means are over those who train a parameter; {kind} takes whole updates; use fedavg"
    if isinstance(run.privacy, ClientLevelPrivacy):
        yield "trains: who trains what would divide the noised sum; let all clients train everything"
    if run.of_group(group).training.kind == "zeroth-order":
        yield "trains: zeroth-order directions cover everything that the method trains; use 'first-order'"
