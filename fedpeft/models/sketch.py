"""A model's tensors by shape alone: what they take in memory is known before any weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedpeft.config.sections import ModelSection, PeftSection
from fedpeft.models.attach import attach
from fedpeft.models.base_model import skeleton_of
from fedpeft.models.quantization import (
    DTYPES,
    LEAN_FROM,
    find_unquantised_modules,
    levels_asked,
    quantization_of,
)
from fedpeft.models.rounded_linear import RoundedLinear
from fedpeft.models.rounded_loading import RoundedConfig, replace_layers
from fedpeft.models.trainable import trainable_parameters

__all__ = ["ModelSketch", "Weights", "sketch", "weights_of"]

_FLOAT = 4
_BLOCK, _SCALES_BLOCK = 64, 256  # numbers that share a scale in bitsandbytes' 4-bit layers; scales that do
_STARTS = ("init_lora_weights", "loftq_config")  # they change values, never shapes

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weights:
    """What a model with its adapter holds, in bytes.

    Attributes:
        frozen: frozen weights, their scales, and buffers.
        unpacked: scratch of the largest quantised layer while it computes.
        castable: bfloat16 copies of the float32 matrices that autocast makes.
        lean: the heap keeps no large freed blocks; see `fedpeft.models.quantization.lean_heap`.
        shapes: of the trainable parameters (float32), by full name.
    """

    frozen: int
    unpacked: int
    castable: int
    lean: bool
    shapes: Mapping[str, Shape]


@dataclass(frozen=True)
class ModelSketch:
    """A model on torch's meta device, and what it would take."""

    model: nn.Module
    weights: Weights


def weights_of(model: nn.Module) -> Weights:
    """Measure a loaded model."""
    frozen = {p.data_ptr(): p.nbytes for p in model.parameters() if not p.requires_grad}
    states = [s for p in model.parameters() if (s := getattr(p, "quant_state", None)) is not None]
    tensors = (t for state in states for t in state.as_dict(packed=True).items())
    scales = sum(tensor.nbytes for key, tensor in tensors if "bitsandbytes" not in key)  # a note on shapes
    widest = [_FLOAT * int(torch.Size(state.shape).numel()) for state in states]
    widest += [_measure_scratch(m) for m in model.modules() if isinstance(m, RoundedLinear)]
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    return Weights(
        frozen=sum(frozen.values()) + scales + _row_scales(model) + sum(b.nbytes for b in model.buffers()),
        unpacked=max(widest, default=0),
        castable=sum(2 * w.numel() for w in matrices if w.nbytes == _FLOAT * w.numel()),
        lean=_lean(model),
        shapes=_shapes(model),
    )


def sketch(section: ModelSection, peft: PeftSection, *, num_labels: int | None = None) -> ModelSketch:
    """Attach the method to the model's shapes; nothing but its configuration is read.

    Tuners that look at values while they are attached (BOFT, SHiRA, Uni-LoRA) cannot be sketched.

    Raises:
        ModelError: no configuration, a layer that cannot be quantised, or a method that can't be attached.
    """
    base = skeleton_of(section, num_labels)
    base.requires_grad_(False)
    packed = _measure_packed(section, base)
    wide, unpacked = DTYPES[section.dtype].itemsize, 0
    if section.quantization in ("nf4", "fp4"):
        unpacked = max(_FLOAT * size for size, _ in packed.values())
    rounded = [_measure_scratch(m) for m in base.modules() if isinstance(m, RoundedLinear)]
    plain = {id(p): p.numel() * wide for n, p in base.named_parameters() if n not in packed}
    own = {id(t) for m in base.modules() if isinstance(m, RoundedLinear) for t in (m.weight, *m.buffers())}
    frozen = sum(size for key, size in plain.items() if key not in own)
    frozen += sum(size for _, size in packed.values())
    frozen += sum(p.nbytes for p in base.parameters() if id(p) in own) + sum(b.nbytes for b in base.buffers())
    castable = _castable(base, set(packed)) if section.dtype == "float32" else 0
    known = {id(t) for t in (*base.parameters(), *base.buffers())}
    given = {key: value for key, value in peft.options.items() if key not in _STARTS}
    with torch.device("meta"):
        method = PeftSection.model_validate({"method": peft.method, **given})
        model = attach(base, method, task=section.task, seed=0)
    more = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in known and not t.requires_grad]
    return ModelSketch(
        model,
        Weights(
            frozen=frozen + sum(t.nbytes for t in more),
            unpacked=max([unpacked, *rounded]),
            castable=castable + 2 * _adapter_matrices(model, known),
            lean=section.quantization != "none" or _lean(model),
            shapes=_shapes(model),
        ),
    )


def _lean(model: nn.Module) -> bool:
    base: Any = model
    base = base.get_base_model()
    names = (p.numel() for n, p in base.named_parameters() if not p.requires_grad and ".lora_" not in n)
    return quantization_of(base) != "none" or sum(names) >= LEAN_FROM


def _shapes(model: nn.Module) -> dict[str, Shape]:
    return {name: tuple(p.shape) for name, p in trainable_parameters(model).items()}


def _measure_packed(section: ModelSection, base: nn.Module) -> dict[str, tuple[int, int]]:
    """Parameters that bitsandbytes would pack, by name: their numbers, and the bytes with scales.

    Layers that are rounded to integers are put in place instead.
    """
    if section.quantization == "none":
        return {}
    kept = set(find_unquantised_modules(section, base))
    levels = levels_asked(section)
    if levels is not None:
        with torch.device("meta"):
            replace_layers(base, levels, kept, None)
        config: Any = base.config
        config.quantization_config = RoundedConfig(levels.bits, levels.group_size, kept)
        return {}
    linear = {n: m for n, m in base.named_modules() if isinstance(m, nn.Linear | Conv1D) and n not in kept}
    found = {}
    for name, module in linear.items():
        weight: Any = module.weight
        tall = weight.shape[1] if isinstance(module, Conv1D) else weight.shape[0]
        found[f"{name}.weight"] = (weight.numel(), _measure_packed_matrix(section, weight.numel(), int(tall)))
    return found


def _measure_packed_matrix(section: ModelSection, numbers: int, rows: int) -> int:
    """Bytes of one matrix as bitsandbytes packs it, with the scales and tables beside it."""
    if section.quantization == "int8":
        return numbers + _FLOAT * rows
    blocks = -(-numbers // _BLOCK)
    packed = -(-numbers // 2) + _FLOAT * 16
    if section.double_quantization is False:
        return packed + _FLOAT * blocks
    return packed + blocks + _FLOAT * -(-blocks // _SCALES_BLOCK) + _FLOAT * 256


def _measure_scratch(layer: RoundedLinear) -> int:
    """The weight, and beside it the integers less their zeros or the weight's gradient."""
    return 2 * _FLOAT * layer.in_features * layer.out_features


def _row_scales(model: nn.Module) -> int:
    """Scales of 8-bit layers, which move to the layer when they are first used."""
    found: dict[int, int] = {}  # by address: adapters around a layer show its scales again
    for module in model.modules():
        for owner in (getattr(module, "weight", None), getattr(module, "state", None)):
            scales = getattr(owner, "SCB", None)
            if isinstance(scales, torch.Tensor):
                found[scales.data_ptr()] = scales.nbytes
    return sum(found.values())


def _castable(base: nn.Module, packed: Iterable[str]) -> int:
    named = set(packed)
    linear = {f"{n}.weight": m.weight for n, m in base.named_modules() if type(m) is nn.Linear}
    return 2 * sum(weight.numel() for name, weight in linear.items() if name not in named)


def _adapter_matrices(model: nn.Module, known: set[int]) -> int:
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    return sum(weight.numel() for weight in matrices if id(weight) not in known)
