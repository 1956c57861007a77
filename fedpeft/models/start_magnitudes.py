"""How large the entries of tensors count that begin all alike, where a rule asks for the smallest weights.

LoRA's B begins at zero, so that its own magnitudes choose nothing. Its entries stand for the base's weights:
an entry B[i, k] moves the output i along A[k], where the base has (W A^T)[i, k] already.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from fedpeft.errors import ModelError
from fedpeft.models.rounded_linear import RoundedLinear
from fedpeft.models.trainable import trainable_parameters

__all__ = ["start_magnitudes"]

_OF_THE_BASE = (".ln_tuning_layers.", ".modules_to_save.")


def start_magnitudes(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what stands for the magnitudes of trainable tensors that begin all alike, by name, on the CPU.

    Of LoRA's zero factors it is the base's product with the other factor, float64 in the factor's shape. Of
    biases and scales that lie beside matrices it is zero, so that they keep their place in the choice.

    Raises:
        ModelError: another tensor begins all alike, so that none of its entries is smaller than others.
    """
    known = dict(_products(model))
    found = {}
    for name, parameter in trainable_parameters(model).items():
        flat = parameter.detach().reshape(-1)
        if flat.numel() < 2 or not bool((flat == flat[0]).all()):
            continue
        beside = flat.numel() == max(parameter.shape) and any(mark in name for mark in _OF_THE_BASE)
        if name not in known and not beside:
            raise ModelError(
                f"training.rule 'sparse' moves the smallest weights, and those of '{name}' begin all alike;"
                " choose another rule, or lora or full, whose weights differ"
            )
        found[name] = known.get(name, torch.zeros(parameter.shape, dtype=torch.float64))
    return found


def _products(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The base's product with the other factor, for either factor of each LoRA layer that may be zero."""
    for name, module in model.named_modules():
        layer: Any = module
        for adapter in getattr(layer, "lora_A", None) or ():
            weight, a = _weight(layer), _host(layer.lora_A[adapter].weight)
            if weight.shape[1] == a.shape[1]:
                yield f"{name}.lora_B.{adapter}.weight", (weight @ a.t()).abs()
        for adapter in getattr(layer, "lora_embedding_B", None) or ():
            b = _host(layer.lora_embedding_B[adapter])  # (width, r), of a table (tokens, width)
            yield f"{name}.lora_embedding_A.{adapter}", (b.t() @ _weight(layer).t()).abs()


def _weight(layer: Any) -> torch.Tensor:
    """A layer's weight (out, in), unpacked; of an embedding (tokens, width)."""
    base = layer.get_base_layer()
    if isinstance(base, RoundedLinear):
        return _host(base.dequantise().weight)
    weight = _host(dequantize_module_weight(base))
    return weight.t() if type(base).__name__ == "Conv1D" else weight


def _host(tensor: torch.Tensor) -> torch.Tensor:
    """Exact on every machine but for the order of sums, which float64 hides from the choice."""
    return tensor.detach().cpu().double()
