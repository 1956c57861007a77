"""Scale-only tuning: W = s0 (1 + d) (q - z), with the integers q and z frozen and d trained.

Source: Kim et al. 2023, "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit
Integer Quantization" (PEQA), equation 2, W = (s0 + ds)(q - z). We train d = ds / s0: steps of every method
and noise then mean the same share of each scale, whatever its size. The weight stays linear in what is
trained, so the mean of parameters is the mean of models.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from fedpeft.models.rounded_linear import RoundedLinear


@dataclass
class PEQAConfig(PeftConfig):  # type: ignore[misc]  # peft is untyped
    """Configuration of scale-only tuning.

    Attributes:
        target_modules: rounded layers to wrap, by name or by one regular expression.
        exclude_modules: names to leave out.
        modules_to_save: further modules to train and save whole.
    """

    TYPE: ClassVar[str] = "FEDPEFT_PEQA"

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.TYPE


class PEQALayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # peft is untyped
    """A rounded layer with trained scales.

    Shapes: `peqa_gain` holds one float32 matrix (out_features, groups) per adapter, zero at the start.
    """

    adapter_layer_names = ("peqa_gain",)

    # What `peft`, which is untyped, defines.
    base_layer: Any
    active_adapters: Any
    disable_adapters: Any
    get_base_layer: Any
    set_adapter: Any
    merged: Any

    def __init__(self, base_layer: RoundedLinear, adapter_name: str, inference_mode: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.peqa_gain = nn.ParameterDict()
        self.merged_adapters: list[str] = []
        self.add(adapter_name, inference_mode)

    def add(self, adapter_name: str, inference_mode: bool) -> None:
        """Give the layer one more adapter, at the base's own scales."""
        self.peqa_gain[adapter_name] = nn.Parameter(torch.zeros_like(self.base_layer.weight_scale))
        self.set_adapter([adapter_name], inference_mode=inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        layer = self.get_base_layer()
        if self.disable_adapters or self.merged:
            plain: torch.Tensor = layer(x)
            return plain
        product: torch.Tensor = layer.product(x, self._scale(self.active_adapters))
        return product

    def _scale(self, names: Any) -> torch.Tensor:
        scale: torch.Tensor = self.get_base_layer().weight_scale
        for name in names:
            scale = scale * (1.0 + self.peqa_gain[name])
        return scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the trained scales in the place of the layer's own; its integers stay.

        Raises:
            ValueError: `safe_merge` and a scale is not finite.
        """
        layer, names = self.get_base_layer(), adapter_names or self.active_adapters
        scale = self._scale(names).detach()
        if safe_merge and not torch.isfinite(scale).all():
            raise ValueError(f"NaNs detected in the merged scales. The adapter {names[0]} seems to be broken")
        layer.weight_scale = scale
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Refuse: a scale of zero cannot be divided out again.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("PEQA cannot be unmerged")


class PEQAModel(BaseTuner):  # type: ignore[misc]  # peft is untyped
    """Wraps the rounded layers of a model in `PEQALayer`s."""

    prefix = "peqa_"
    tuner_layer_cls = PEQALayer
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
        if isinstance(target, PEQALayer):
            target.add(adapter_name, peft_config.inference_mode)
            return
        if not isinstance(target, RoundedLinear):
            raise ValueError(
                f"PEQA trains the scales of rounded layers; '{current_key}' is a {type(target).__name__}"
            )
        layer = PEQALayer(target, adapter_name, peft_config.inference_mode)
        self._replace_module(parent, target_name, layer, target)
