"""From an adapter's named arrays to LoRA products and back, by peft's names."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedpeft.errors import UpdateError
from fedpeft.updates.low_rank import LoraFactors

Arrays = Mapping[str, npt.NDArray[np.float32]]

_A, _B = "lora_A", "lora_B"


@dataclass(frozen=True)
class LoraArrays:
    """An adapter taken apart: `pairs` by name with the factor's role left open (`{}`), and other arrays."""

    pairs: Mapping[str, LoraFactors]
    others: Arrays


def take_apart(arrays: Arrays, scalings: Mapping[str, float]) -> LoraArrays:
    """Pair the A and B of each module: `x.lora_A.weight` goes with `x.lora_B.weight`.

    Args:
        arrays: whole factors (not their deltas: a product of deltas is not the delta of a product), float32.
        scalings: s = lora_alpha / r (or its rank-stabilised form) per module path, the part before `.lora_A`.

    Raises:
        UpdateError: an A without its B or the reverse, a factor that is no matrix, or a module without a
            scaling.
    """
    pairs: dict[str, LoraFactors] = {}
    others: dict[str, npt.NDArray[np.float32]] = {}
    for name, array in arrays.items():
        role, pattern = factor_role(name)
        if role is None:
            others[name] = array
            continue
        partner = pattern.format(_B if role == _A else _A)
        if partner not in arrays:
            raise UpdateError(f"{name!r} came without {partner!r}: both factors are needed for a product")
        if role == _A:
            module = pattern.partition(".{}")[0]
            if module not in scalings:
                raise UpdateError(f"no scaling for module {module!r}: give lora_alpha / r for each")
            pairs[pattern] = LoraFactors(array, arrays[partner], scalings[module])
    return LoraArrays(pairs, others)


def put_together(parts: LoraArrays) -> dict[str, npt.NDArray[np.float32]]:
    """Inverse of `take_apart`, up to order; factors become float32, scalings stay with the caller."""
    arrays = dict(parts.others)
    for pattern, factors in parts.pairs.items():
        arrays[pattern.format(_A)] = factors.a.astype(np.float32)
        arrays[pattern.format(_B)] = factors.b.astype(np.float32)
    return arrays


def factor_role(name: str) -> tuple[str | None, str]:
    """`lora_A`, `lora_B` or None, and the name with that path component replaced by `{}`."""
    components = name.split(".")
    for role in (_A, _B):
        # A component in first place has no module before it.
        if role in components[1:]:
            at = components.index(role, 1)
            if any("{" in part or "}" in part for part in components):
                raise UpdateError(f"parameter name {name!r} holds braces: rename it")
            return role, ".".join([*components[:at], "{}", *components[at + 1 :]])
    return None, name
