"""Bottleneck adapters: y = h + up(act(down(h))) with h = layer(x), after the layers that end a block.

Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1 and figure 2: two
per transformer layer, each after the projection that ends the block and before the residual sum. The paper
starts near the identity; we start at it, with the up-projection at zero. Layer norms stay frozen here; the
paper trains them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


@dataclass
class BottleneckConfig(PeftConfig):  # type: ignore[misc]  # peft is untyped
    """Configuration of bottleneck adapters.

    Attributes:
        bottleneck_size: width of the inner layer, in features.
        non_linearity: relu, gelu, silu or tanh.
        bottleneck_dropout: share of inner features dropped in training.
        init_std: standard deviation of the down-projection's draw.
        target_modules: linear layers to wrap, by name or by one regular expression.
        exclude_modules: names to leave out.
        modules_to_save: further modules to train and save whole.
    """

    TYPE: ClassVar[str] = "FEDPEFT_BOTTLENECK"

    bottleneck_size: int = field(default=16)
    non_linearity: str = field(default="gelu")
    bottleneck_dropout: float = field(default=0.0)
    init_std: float = field(default=0.02)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.TYPE
        if self.non_linearity not in _ACTIVATIONS:
            raise ValueError(f"non_linearity '{self.non_linearity}' must be one of {', '.join(_ACTIVATIONS)}")
        if self.bottleneck_size < 1:
            raise ValueError(f"bottleneck_size is {self.bottleneck_size}; it must be at least 1")


class BottleneckLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # peft is untyped
    """A linear layer followed by a residual two-layer network.

    Shapes: down (bottleneck_size, out_features), up (out_features, bottleneck_size), biases, all float32.
    """

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    # What `peft`, which is untyped, defines.
    base_layer: Any
    active_adapters: Any
    disable_adapters: Any
    enable_adapters: Any
    get_base_layer: Any
    set_adapter: Any
    _cast_input_dtype: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._inner = nn.Sequential(
            _ACTIVATIONS[config.non_linearity](), nn.Dropout(config.bottleneck_dropout)
        )
        self.add(adapter_name, config)

    def add(self, adapter_name: str, config: Any) -> None:
        """Give the layer one more adapter, at the identity."""
        features, device = int(self.base_layer.out_features), self.base_layer.weight.device
        down = nn.Linear(features, config.bottleneck_size)
        up = nn.Linear(config.bottleneck_size, features)
        nn.init.normal_(down.weight, std=config.init_std)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.bottleneck_down[adapter_name] = down.to(device)
        self.bottleneck_up[adapter_name] = up.to(device)
        self.set_adapter([adapter_name], inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features), in the dtype of the wrapped layer's output."""
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            down, up = self.bottleneck_down[name], self.bottleneck_up[name]
            y = y + up(self._inner(down(self._cast_input_dtype(y, down.weight.dtype)))).to(y.dtype)
        return y


class BottleneckModel(BaseTuner):  # type: ignore[misc]  # peft is untyped
    """Wraps the target modules of a model in `BottleneckLayer`s."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.add(adapter_name, peft_config)
            return
        if not isinstance(target, nn.Linear):
            raise ValueError(
                f"bottleneck adapters follow linear layers; '{current_key}' is a {type(target).__name__}"
            )
        layer = BottleneckLayer(target, adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)
