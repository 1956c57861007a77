"""Which arrays of an update are the two factors of one LoRA product, and how that product is scaled."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedpeft.config.sections import PeftSection
from fedpeft.runtime.name_patterns import NamePattern
from fedpeft.updates.update import Layout

_A, _B = "lora_A", "lora_B"
_ALPHA = 8  # peft's default


@dataclass(frozen=True)
class Pair:
    """The names of A (r x n) and B (m x r), and the scaling s of s B A."""

    a: str
    b: str
    scaling: float


def lora_pairs(layout: Layout, peft: PeftSection) -> tuple[Pair, ...]:
    """Every module of which both factors travel as matrices; others count by their entries.

    Only a module's share in norms and distances depends on `s`, which is what peft makes of the run file's
    `lora_alpha`, `alpha_pattern` and `use_rslora`.

    Raises:
        ModelError: an expression of `alpha_pattern` takes too long to match.
    """
    pairs, alphas = [], _alphas(peft)
    for name in sorted(layout):
        components = name.split(".")
        if _A not in components[1:]:
            continue
        at = components.index(_A, 1)
        other = ".".join([*components[:at], _B, *components[at + 1 :]])
        if other not in layout:
            continue
        first, second = layout[name][0], layout[other][0]
        if len(first) == len(second) == 2 and first[0] == second[1]:
            module = ".".join(components[:at])
            pairs.append(Pair(name, other, _scaling(peft, alphas, module, first[0])))
    return tuple(pairs)


def _alphas(peft: PeftSection) -> list[tuple[NamePattern, float]]:
    """Values of `lora_alpha` by the modules that they are for; the first that matches one counts."""
    table = peft.options.get("alpha_pattern") or {}
    if not isinstance(table, Mapping):
        return []
    return [(NamePattern(text, "peft.alpha_pattern"), value) for text, value in table.items()]


def _scaling(peft: PeftSection, alphas: Sequence[tuple[NamePattern, float]], module: str, rank: int) -> float:
    options = peft.options
    alpha = next((own for pattern, own in alphas if pattern.ends(module)), options.get("lora_alpha", _ALPHA))
    stable = peft.method == "rslora" or bool(options.get("use_rslora"))
    return float(alpha) / (math.sqrt(rank) if stable else rank)
