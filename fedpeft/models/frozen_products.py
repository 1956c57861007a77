"""Frozen low-rank products beside LoRA's own: what a base's weights, quantised ones for instance, can't take.

A layer computes base(x) + s B A x + P (Q x), with P (m x K) and Q (K x n) frozen. They are added by a hook on
the layer, so that the adapter of the run, its names and its trained parameters stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear

from fedpeft.errors import ModelError
from fedpeft.updates.low_rank import LoraFactors

_ATTRIBUTE = "frozen_products"


class FrozenProducts:
    """The products of one model, by module; none at first.

    Args:
        model: from `attach`, with LoRA layers; every one of them is given a hook for good.
    """

    def __init__(self, model: nn.Module) -> None:
        self._held: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._layers: dict[str, Any] = {
            name: module
            for name, module in model.named_modules()
            if isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and len(module.lora_A)
        }
        for name, layer in self._layers.items():
            layer.register_forward_hook(self._adding(name))
        setattr(model, _ATTRIBUTE, self)

    def write(self, products: Mapping[str, LoraFactors]) -> None:
        """Let these be the products; modules that are not named have none.

        Raises:
            ModelError: a module that is no LoRA layer, or factors of other sizes.
        """
        held = {}
        for name, factors in products.items():
            if name not in self._layers:
                raise ModelError(f"a frozen product for '{name}' came, which is no LoRA layer of this model")
            layer = self._layers[name]
            wanted, came = (layer.out_features, layer.in_features), (factors.b.shape[0], factors.a.shape[1])
            if came != wanted:
                raise ModelError(f"a frozen product of {came} came for '{name}', whose weight is {wanted}")
            device = next(iter(layer.lora_A.values())).weight.device
            held[name] = (_tensor(factors.a, device), _tensor(factors.b, device))
        self._held = held

    def read(self) -> dict[str, LoraFactors]:
        """Inverse of `write`."""
        return {
            name: LoraFactors(a.cpu().numpy(), b.cpu().numpy(), 1.0) for name, (a, b) in self._held.items()
        }

    def _adding(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            held = self._held.get(name)
            if held is None:
                return output
            a, b = held
            return output + linear(linear(args[0].to(a.dtype), a), b).to(output.dtype)

        return add


def get_frozen_products(model: nn.Module) -> dict[str, LoraFactors]:
    """The frozen products of a model, by module; empty where it holds none."""
    holder = getattr(model, _ATTRIBUTE, None)
    return holder.read() if isinstance(holder, FrozenProducts) else {}


def get_frozen_factors(model: nn.Module) -> dict[str, np.ndarray]:
    """LoRA's A of each module where it doesn't train, by its parameter's name."""
    return {
        name: parameter.detach().cpu().numpy()
        for name, parameter in model.named_parameters()
        if ".lora_A." in name and not parameter.requires_grad
    }


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32)).to(device)
