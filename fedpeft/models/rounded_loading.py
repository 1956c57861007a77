"""Loading a model with its weights rounded one after another, through transformers' door for quantisers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from fedpeft.errors import ModelError
from fedpeft.models.rounded_linear import Levels, RoundedLinear, levels_of

__all__ = ["RoundedConfig", "dequantise", "replace_layers", "round_layers"]

_NAME = "fedpeft-rounded"


@register_quantization_config(_NAME)
class RoundedConfig(QuantizationConfigMixin):  # type: ignore[misc]  # transformers is untyped
    """What the loader is told: levels, the full names of modules left alone, and the dtype of products."""

    def __init__(
        self,
        bits: int = 8,
        group_size: int | None = None,
        modules_to_not_convert: Iterable[str] = (),
        compute_dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = _NAME
        self.bits = bits
        self.group_size = group_size
        self.modules_to_not_convert = sorted(modules_to_not_convert)
        self.compute_dtype = compute_dtype

    @property
    def levels(self) -> Levels:
        """How finely weights are rounded."""
        return Levels(self.bits, self.group_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a model's configuration holds them."""
        dtype = None if self.compute_dtype is None else str(self.compute_dtype).removeprefix("torch.")
        return {**self.__dict__, "compute_dtype": dtype}


class _Round(ConversionOps):  # type: ignore[misc]  # transformers is untyped
    """One full-precision weight in, its integers, scales and zeros out."""

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str | None = None, **_: Any
    ) -> dict[str, torch.Tensor]:
        """Round what was read; the full-precision tensor is dropped with the call."""
        result: dict[str, torch.Tensor] = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            module, _ = get_module_from_name(model, name)
            rounded = levels_of(weight.t() if module.transposed else weight, module.levels)
            module._is_hf_initialized = True
            result[name] = nn.Parameter(rounded.codes, requires_grad=False)
            result[f"{name}_scale"], result[f"{name}_zero"] = rounded.scale, rounded.zero
        return result


@register_quantizer(_NAME)
class _RoundedQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers is untyped
    """Puts `RoundedLinear` in the place of linear layers, and rounds their weights as they are read."""

    requires_calibration = False

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether this tensor of the file is the weight of a layer to be rounded."""
        module, name = get_module_from_name(model, param_name)
        return isinstance(module, RoundedLinear) and name == "weight"

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        config: Any = self.quantization_config
        with torch.device("meta"):
            replace_layers(model, config.levels, config.modules_to_not_convert, config.compute_dtype)
        return model

    def get_quantize_ops(self) -> _Round:
        """The conversion of one tensor."""
        return _Round()

    def is_serializable(self) -> bool:
        """Such a model isn't saved; its base and options say it all."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Adapters on it, and its scales, can be trained."""
        return True


def round_layers(model: nn.Module, levels: Levels, keep: Iterable[str] = ()) -> nn.Module:
    """Round the linear layers of a loaded model in place, one after another; the model.

    Args:
        keep: full names of the layers that stay.

    Raises:
        ModelError: a layer's shape cannot be rounded so.
    """
    before = {name: module for name, module in model.named_modules() if _rounds(module)}
    replace_layers(model, levels, keep, None)
    for name, layer in before.items():
        fresh: Any = model.get_submodule(name)
        if isinstance(fresh, RoundedLinear):
            weight: Any = layer.weight.detach()
            fresh.take(weight.t() if isinstance(layer, Conv1D) else weight)
            if layer.bias is not None:
                fresh.bias = layer.bias
    model.config.quantization_config = RoundedConfig(levels.bits, levels.group_size, keep)  # type: ignore[union-attr]
    return model


def dequantise(model: nn.Module) -> nn.Module:
    """Put ordinary float32 layers in the place of rounded ones; the model computes what it did."""
    for name, module in list(model.named_modules()):
        if isinstance(module, RoundedLinear):
            model.set_submodule(name, module.dequantise())
    config: Any = model.config
    if isinstance(getattr(config, "quantization_config", None), RoundedConfig):
        del config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    return model


def _rounds(module: nn.Module) -> bool:
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def replace_layers(model: nn.Module, levels: Levels, keep: Iterable[str], dtype: torch.dtype | None) -> None:
    """Put empty rounded layers in the place of linear ones.

    Raises:
        ModelError: a layer's shape cannot be rounded so.
    """
    kept = set(keep)
    for name, module in list(model.named_modules()):
        if name in kept or not _rounds(module):
            continue
        shape: Any = module.weight.shape
        transposed = isinstance(module, Conv1D)
        wide, tall = shape if transposed else (shape[1], shape[0])
        try:
            fresh = RoundedLinear(wide, tall, module.bias is not None, levels, dtype)
        except ValueError as error:
            raise ModelError(
                f"module '{name}' cannot be rounded to {levels.bits} bits: {error}; name it in"
                " model.keep_modules, or choose another model.group_size"
            ) from error
        fresh.transposed = transposed  # type: ignore[assignment]  # read when its weight comes
        model.set_submodule(name, fresh)
