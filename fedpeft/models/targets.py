"""Which modules of a model a method wraps, and options that must fit the shapes of these modules."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpeft.errors import ModelError
from fedpeft.models.base_model import head_modules
from fedpeft.models.methods import Method
from fedpeft.models.rounded_linear import RoundedLinear
from fedpeft.runtime.name_patterns import NamePattern

NOTHING = "dummy-target-modules"
"""The value of `target_modules` for which `peft` wraps nothing."""

_FEEDFORWARD_OUT = ("down_proj", "output.dense", "fc2", "fc_out", "dense_4h_to_h", "mlp.c_proj", "wo", "lin2")
_ATTENTION_OUT = ("o_proj", "attention.output.dense", "out_proj", "attn.c_proj", "attention.dense", "out_lin")
_KEYS_VALUES = ("k_proj", "v_proj", "key", "value", "k_lin", "v_lin", "query_key_value", "c_attn")


_STATE_SPACE_MODELS = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
_FUSED = ("out_proj", "dt_proj")  # kernels read these layers' weights, and pass over an adapter on them


def default_targets(method: Method, base: nn.Module, task: str) -> dict[str, Any]:
    """Return the target options that the method takes on this model when the run file names none.

    Raises:
        ModelError: the model has no modules of the wanted kind under a name that we know.
    """
    if method.targets == "none":
        return {}
    if method.targets == "head" and task == "sequence-classification":
        return {"target_modules": NOTHING}
    names = _FINDERS[method.targets](base)
    if not names:
        raise ModelError(
            f"peft.method '{method.name}' finds no {method.targets} modules by their usual names; set "
            f"peft.target_modules, of: {', '.join(leaf_names(base))}"
        )
    if method.targets != "ia3":
        return {"target_modules": names}
    return {"target_modules": names, "feedforward_modules": [n for n in names if n in _FEEDFORWARD_OUT]}


def check_targets(method: Method, key: str, given: Any, base: nn.Module) -> None:
    """Check module names from the run file against the model.

    `given` is a list of names (whole, or the end of one after a dot) or one expression for whole names.

    Raises:
        ModelError: wrong type, a bad expression, or a name that no module has; says which are there.
    """
    modules = [name for name, _ in base.named_modules() if name]
    if isinstance(given, str):
        if given != "all-linear" and not NamePattern(given, f"peft.{key}").matching(modules):
            raise ModelError(
                f"peft.{key} '{given}' matches no module; there are: {', '.join(leaf_names(base))}"
            )
        return
    if not isinstance(given, Sequence) or not all(isinstance(name, str) for name in given) or not given:
        raise ModelError(
            f"peft.{key} is {given!r}; '{method.name}' needs a list of module names or one expression"
        )
    for name in given:
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            near = get_close_matches(name, leaf_names(base), n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise ModelError(
                f"peft.{key} names '{name}', which is not in the model; {hint}there are: "
                f"{', '.join(leaf_names(base))}"
            )


def find_modules(base: nn.Module, given: Any) -> list[str]:
    """Full names of the modules that `target_modules` means: names, ends of names, or an expression of ours.

    That of a run file has become names before, see `fedpeft.models.explicit_names`.
    """
    names = [name for name, _ in base.named_modules() if name]
    if isinstance(given, str):
        return [name for name in names if re.fullmatch(given, name)]
    return [name for name in names if any(name == end or name.endswith(f".{end}") for end in given or ())]


def leaf_names(base: nn.Module) -> list[str]:
    """Return the last parts of the names of all modules that hold weights themselves, sorted."""
    return sorted({name.rpartition(".")[2] for name in _leaves(base)})


def fit_options(method: Method, base: nn.Module, targets: Any) -> dict[str, Any]:
    """Return defaults that depend on the shapes of the target layers, by the method's `fit` rule."""
    if method.fit is None:
        return {}
    shapes = [_shape(base.get_submodule(name)) for name in _matching(base, targets)]
    return _FITS[method.fit](shapes) if shapes else {}


def _linear(base: nn.Module) -> list[str]:
    """Name all linear layers but the output head, by their last parts where that is unambiguous."""
    heads = set(head_modules(base)) | {_output_head(base)}
    fused = _FUSED if getattr(base.config, "model_type", "") in _STATE_SPACE_MODELS else ()
    wanted: set[str] = set()
    others: set[str] = set()
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            inside_head = any(name == head or name.startswith(f"{head}.") for head in heads if head)
            left_out = inside_head or name.rpartition(".")[2] in fused
            (others if left_out else wanted).add(name)
    leaves = {name.rpartition(".")[2] for name in wanted}
    shared = leaves & {name.rpartition(".")[2] for name in others}
    return sorted(leaves - shared) + sorted(name for name in wanted if name.rpartition(".")[2] in shared)


def _find_rounded(base: nn.Module) -> list[str]:
    return sorted(name for name, module in base.named_modules() if isinstance(module, RoundedLinear))


def _first_linear(base: nn.Module) -> list[str]:
    heads = head_modules(base)
    linear = (name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D))
    return [name for name in linear if name.split(".")[0] not in heads][:1]


def _norm(base: nn.Module) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in _leaves(base) if "Norm" in _class_name(base, name)})


def _every_leaf(base: nn.Module) -> list[str]:
    return sorted(_leaves(base))


def _language_head(base: nn.Module) -> list[str]:
    name = _output_head(base)
    return [name] if name else []


def _ia3(base: nn.Module) -> list[str]:
    return [*_present(base, _KEYS_VALUES), *_present(base, _FEEDFORWARD_OUT)]


def _block_output(base: nn.Module) -> list[str]:
    return [*_present(base, _ATTENTION_OUT), *_present(base, _FEEDFORWARD_OUT)]


def _present(base: nn.Module, names: Sequence[str]) -> list[str]:
    modules = [name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [name for name in names if any(module.endswith(f".{name}") for module in modules)]


def _leaves(base: nn.Module) -> list[str]:
    """Name the modules that hold parameters directly, the head's excepted."""
    heads = head_modules(base)
    return [
        name
        for name, module in base.named_modules()
        if next(module.parameters(recurse=False), None) is not None
        and not any(name == head or name.startswith(f"{head}.") for head in heads)
    ]


def _output_head(base: nn.Module) -> str:
    getter = getattr(base, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return (
        next((name for name, module in base.named_modules() if module is head), "")
        if head is not None
        else ""
    )


def _class_name(base: nn.Module, name: str) -> str:
    return type(base.get_submodule(name)).__name__


def _matching(base: nn.Module, targets: Any) -> list[str]:
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    if isinstance(targets, str):
        return [name for name in names if re.fullmatch(targets, name)]
    return [name for name in names if any(name == t or name.endswith(f".{t}") for t in targets)]


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) features."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    conv: Any = module  # transformers' Conv1D, which is untyped
    return int(conv.nx), int(conv.nf)


def _divisor(sizes: Iterable[int], cap: int) -> int:
    """Return the largest number up to `cap` that divides every size."""
    shared = math.gcd(*sizes)
    return max(d for d in range(1, min(cap, shared) + 1) if shared % d == 0)


def _smallest(shapes: Sequence[tuple[int, int]]) -> int:
    return min(rows * columns for rows, columns in shapes)


_FINDERS: Mapping[str, Callable[[nn.Module], list[str]]] = {
    "linear": _linear,
    "rounded": _find_rounded,
    "ia3": _ia3,
    "norm": _norm,
    "block-output": _block_output,
    "every-leaf": _every_leaf,
    "head": _language_head,
    "first-linear": _first_linear,
}

_FITS: Mapping[str, Callable[[Sequence[tuple[int, int]]], dict[str, Any]]] = {
    "c3a": lambda shapes: {"block_size": _divisor(chain(*shapes), 256)},
    "vblora": lambda shapes: {"vector_length": _divisor(chain(*shapes), 256)},
    "oft": lambda shapes: {"oft_block_size": _divisor((wide for wide, _ in shapes), 32)},
    "road": lambda shapes: {"group_size": _divisor((tall for _, tall in shapes), 64)},
    "fourierft": lambda shapes: {"n_frequency": min(1000, _smallest(shapes))},
    "waveft": lambda shapes: {"n_frequency": min(2592, _smallest(shapes))},
}
