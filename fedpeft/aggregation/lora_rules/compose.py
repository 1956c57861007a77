"""What the groups of a run may set under its rule, and what no row of `fedpeft.compatibility` can say.

| rule           | ranks | strategies       | downlink | privacy              | trainers    |
|----------------|-------|------------------|----------|----------------------|-------------|
| fedit, ffa     | one   | all              | yes      | all                  | all         |
| rolora         | one   | without a memory | no       | all but record-level | first-order |
| fedsa          | one   | all              | no       | none                 | first-order |
| hetlora        | any   | of the mean      | no       | record-level, local  | all         |
| flexlora       | any   | of the mean      | no       | record-level, local  | all         |
| flora          | any   | of the mean      | no       | record-level, local  | all         |
| exact-residual | any   | of the mean      | no       | record-level, local  | all         |

All of them are for spaces that send entries and for synchronous rounds. Stages go with all: they act on what
a client sends, before the rule sees it.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedpeft.aggregation.lora_rules.shares import rank_of, scaling_of
from fedpeft.aggregation.lora_rules.table import LORA_RULES, LoraRule
from fedpeft.config.option_tables import unknown_name
from fedpeft.config.sections import GroupSection, RunConfig

_MODEL_KEYS = frozenset(
    {"quantization", "double_quantization", "compute_dtype", "group_size", "keep_modules", "dtype"}
)
_PEFT_KEYS = frozenset({"r", "lora_alpha"})


def lora_problems(run: RunConfig) -> list[str]:
    """One line for a rule that there is not, and for each key that a group can't set."""
    problems = [
        f"groups.{place}.{problem}"
        for place, group in enumerate(run.groups)
        for problem in _group(run, group)
    ]
    name = run.federation.lora_rule
    if name is not None and name not in LORA_RULES:
        problems.append(unknown_name("federation.lora_rule", name, LORA_RULES))
    return problems


def _group(run: RunConfig, group: GroupSection) -> Iterator[str]:
    rule = LORA_RULES.get(run.federation.lora_rule or "")
    if not (group.own_model or group.trains):
        return
    for section, keys, allowed in (("model", group.model, _MODEL_KEYS), ("peft", group.peft, _PEFT_KEYS)):
        for key in sorted(keys.keys() - allowed):
            may = ", ".join(sorted(allowed))
            yield f"{section}.{key}: clients of one run share it; a group may set {may}"
    yield from _ranks(run, group, rule)


def _ranks(run: RunConfig, group: GroupSection, rule: LoraRule | None) -> Iterator[str]:
    own = run.of_group(group)
    rank, whole = rank_of(own), rank_of(run)
    if rank > whole:
        yield f"peft.r: {rank} came and the run's adapter has {whole}; a group's rank is at most the run's"
    differs = rank != whole or scaling_of(own) != scaling_of(run)
    if differs and (rule is None or not rule.ranks):
        takers = ", ".join(name for name, each in LORA_RULES.items() if each.ranks)
        yield f"peft: ranks and scalings differ from the run's; set federation.lora_rule to one of {takers}"
