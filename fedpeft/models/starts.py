"""A start near full precision as bytes: computed once, and sent to all who hold the run.

Of each layer the factors, and those of what is taken out of its weight before that is quantised: about two
adapters' worth, where the quantised weights themselves would be the whole base.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from fedpeft.errors import ModelError
from fedpeft.models.loftq import Decomposition

__all__ = [
    "decomposition_bytes",
    "decomposition_of",
    "decomposition_of_model",
    "keep_start",
    "start_of_model",
]

_FACTORS = ("up", "down")
_REMOVED = ("removed-up", "removed-down")
_ATTRIBUTE = "decomposition"


def decomposition_bytes(found: Mapping[str, Decomposition]) -> bytes:
    """Layers' decompositions by name; equal ones give equal bytes."""
    tensors: dict[str, torch.Tensor] = {}
    for name, each in sorted(found.items()):
        pairs = [(_FACTORS, (each.up, each.down))]
        if each.removed is not None:
            pairs.append((_REMOVED, each.removed))
        tensors |= {
            f"{name}/{part}": factor.detach().clone().contiguous()
            for parts, pair in pairs
            for part, factor in zip(parts, pair, strict=True)
        }
    return bytes(save(tensors))


def decomposition_of(content: bytes) -> dict[str, Decomposition]:
    """Inverse of `decomposition_bytes`, for bytes that came from outside.

    Raises:
        ModelError: they are no decompositions.
    """
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ModelError(
            f"the start that came cannot be read: {len(content)} bytes, foreign or cut"
        ) from error
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        if part not in (*_FACTORS, *_REMOVED) or tensor.dtype != torch.float32 or not tensor.isfinite().all():
            raise ModelError(f"the start that came holds '{key}', which is no finite float32 factor")
        layers.setdefault(name, {})[part] = tensor
    return {name: _decomposition(name, parts) for name, parts in sorted(layers.items())}


def _decomposition(name: str, parts: dict[str, torch.Tensor]) -> Decomposition:
    if set(parts) not in (set(_FACTORS), {*_FACTORS, *_REMOVED}):
        raise ModelError(f"the start that came holds {sorted(parts)} of '{name}'; factors are missing")
    removed = (parts["removed-up"], parts["removed-down"]) if len(parts) > 2 else None
    return Decomposition(parts["up"], parts["down"], removed)


def keep_start(model: nn.Module, found: dict[str, Decomposition]) -> None:
    """Remember what a model was started with, for those who are to start alike."""
    setattr(model, _ATTRIBUTE, found)


def decomposition_of_model(model: nn.Module) -> dict[str, Decomposition] | None:
    """What a model was started with, if it was computed from its weights; else None."""
    found: dict[str, Decomposition] | None = getattr(model, _ATTRIBUTE, None)
    return found


def start_of_model(model: nn.Module) -> bytes:
    """What others need to start as this model did; empty for models that start by their seed alone."""
    found = decomposition_of_model(model)
    return decomposition_bytes(found) if found else b""
