"""Every pattern and name that a run file gives to a PEFT method is in use by what was attached.

`peft` passes over a rank for a module that isn't there, a layer that the model lacks, or a parameter that
nothing is called. The attached model is asked, so that what is compared is what `peft` itself did.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fedpeft.errors import ModelError
from fedpeft.runtime.name_patterns import NamePattern

__all__ = ["check_layer_numbers", "check_matches", "find_wrapped_parameters"]

_LISTED = 12


def check_matches(model: nn.Module, given: Mapping[str, Any]) -> None:
    """Refuse patterns, names and layer numbers that play no part in an attached model.

    Args:
        model: what `peft` wrapped.
        given: the options as the run file has them.

    Raises:
        ModelError: one of them matches nothing; says which, with the nearest that would.
    """
    wrapped = _find_wrapped(model)
    if not wrapped:
        return
    for key, value in given.items():
        if key.endswith("_pattern") and isinstance(value, Mapping):
            for text in map(str, value):
                pattern = NamePattern(text, f"peft.{key}")
                if not any(pattern.ends(name) for name in wrapped):
                    raise ModelError(_describe_unmatched(key, text, "no module that is wrapped", wrapped))
    if isinstance(given.get("target_modules"), Sequence) and not isinstance(given["target_modules"], str):
        _check_names(
            "target_modules", given["target_modules"], wrapped, "is wrapped nowhere, as other options say"
        )
    if given.get("target_parameters"):
        parameters = find_wrapped_parameters(model)
        _check_names("target_parameters", given["target_parameters"], parameters, "names no parameter", model)
    _check_layers(given, wrapped)


def _check_names(
    key: str, names: Sequence[str], present: Iterable[str], what: str, model: nn.Module | None = None
) -> None:
    held = list(present)
    for name in names:
        if not any(full == name or full.endswith(f".{name}") for full in held):
            known = held if model is None else [own for own, _ in model.named_parameters()]
            raise ModelError(_describe_unmatched(key, name, what, known))


def check_layer_numbers(base: nn.Module, given: Mapping[str, Any]) -> None:
    """Refuse layer numbers that the base model lacks; where it lacks all, `peft` names the target modules.

    Raises:
        ModelError: a number that no layer has; says which there are.
    """
    _check_numbers(given, [name for name, _ in base.named_modules()], "which the model lacks; there are")


def _check_numbers(given: Mapping[str, Any], names: Iterable[str], what: str) -> None:
    numbers = given.get("layers_to_transform")
    held = {int(part) for name in names for part in name.split(".") if part.isdigit()}
    for number in [numbers] if isinstance(numbers, int) else numbers or ():
        if number not in held:
            there = ", ".join(map(str, sorted(held)))
            raise ModelError(f"peft.layers_to_transform names layer {number!r}, {what} {there}")


def _check_layers(given: Mapping[str, Any], wrapped: Sequence[str]) -> None:
    """Layer numbers, and names of lists of layers."""
    _check_numbers(given, wrapped, "in which nothing is wrapped; those wrapped are")
    patterns = given.get("layers_pattern")
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        if not any(re.search(rf"(?:^|\.){re.escape(pattern)}\.\d+\.", f"{name}.") for name in wrapped):
            raise ModelError(_describe_unmatched("layers_pattern", pattern, "no list of layers", wrapped))


def _find_wrapped(model: nn.Module) -> list[str]:
    """Names of the modules that an adapter lies on, and of their parameters where it lies on these alone."""
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            own = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[own] = None
            parameter = getattr(module, "parameter_name", None)
            if isinstance(parameter, str):
                found[f"{own}.{parameter}"] = None
    return list(found)


def find_wrapped_parameters(model: nn.Module) -> list[str]:
    """Return the full names of parameters that an adapter lies on without a module of their own."""
    modules = model.named_modules()
    return [
        f"{name.replace('.base_layer', '')}.{module.parameter_name}"
        for name, module in modules
        if isinstance(getattr(module, "parameter_name", None), str)
    ]


def _describe_unmatched(key: str, name: str, what: str, known: Iterable[str]) -> str:
    leaves = sorted({full.rpartition(".")[2] for full in known} - {"weight", "bias"})
    near = get_close_matches(name.rpartition(".")[2], leaves, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    more = ", ..." if len(leaves) > _LISTED else ""
    return f"peft.{key}: '{name}' {what}; {hint}there are: {', '.join(leaves[:_LISTED])}{more}"
