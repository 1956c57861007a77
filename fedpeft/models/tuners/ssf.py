"""Scale and shift: y = gamma * layer(x) + beta, one trained gamma and beta per output feature.

Source: Lian, Zhou, Feng, Wang 2022, "Scaling & Shifting Your Features" (SSF), equation 3; the feature-wise
affine map is FiLM of Perez et al. 2017, equation 1, with constants for its generator. We start at gamma = 1,
beta = 0, where SSF draws around these, so that a fresh adapter computes what the base computes; and we scale
the outputs of linear layers alone, where SSF scales those of norms too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn


@dataclass
class SSFConfig(PeftConfig):  # type: ignore[misc]  # peft is untyped
    """Configuration of SSF.

    Attributes:
        target_modules: linear layers to wrap, by name or by one regular expression.
        exclude_modules: names to leave out.
        modules_to_save: further modules to train and save whole.
    """

    TYPE: ClassVar[str] = "FEDPEFT_SSF"

    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.TYPE


class SSFLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # peft is untyped
    """A linear layer with a scale and a shift on its output.

    Shapes: `ssf_scale` and `ssf_shift` hold one float32 vector of `out_features` per adapter.
    """

    adapter_layer_names = ("ssf_scale", "ssf_shift")

    # What `peft`, which is untyped, defines.
    base_layer: Any
    active_adapters: Any
    disable_adapters: Any
    enable_adapters: Any
    get_base_layer: Any
    set_adapter: Any
    merged: Any

    def __init__(self, base_layer: nn.Module, adapter_name: str, inference_mode: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.ssf_scale = nn.ParameterDict()
        self.ssf_shift = nn.ParameterDict()
        self.merged_adapters: list[str] = []
        self.add(adapter_name, inference_mode)

    def add(self, adapter_name: str, inference_mode: bool) -> None:
        """Give the layer one more adapter, at the identity."""
        features, device = int(self.base_layer.out_features), self.base_layer.weight.device
        self.ssf_scale[adapter_name] = nn.Parameter(torch.ones(features, device=device))
        self.ssf_shift[adapter_name] = nn.Parameter(torch.zeros(features, device=device))
        self.set_adapter([adapter_name], inference_mode=inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features), in the dtype of the wrapped layer's output."""
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        dtype = y.dtype
        for name in self.active_adapters:
            y = y * self.ssf_scale[name] + self.ssf_shift[name]
        return y.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the scale and shift into the layer: weight rows times gamma, bias times gamma plus beta.

        Raises:
            ValueError: `safe_merge` and a folded weight is not finite.
        """
        layer = self.get_base_layer()
        for name in adapter_names or self.active_adapters:
            scale, shift = self.ssf_scale[name].detach(), self.ssf_shift[name].detach()
            weight = layer.weight.detach() * scale[:, None]  # (out, in)
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                )
            bias = shift if layer.bias is None else layer.bias.detach() * scale + shift
            layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
            layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Refuse: a scale of zero cannot be divided out again.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("SSF cannot be unmerged")


class SSFModel(BaseTuner):  # type: ignore[misc]  # peft is untyped
    """Wraps the target modules of a model in `SSFLayer`s."""

    prefix = "ssf_"
    tuner_layer_cls = SSFLayer
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
        if isinstance(target, SSFLayer):
            target.add(adapter_name, peft_config.inference_mode)
            return
        if not isinstance(target, nn.Linear):
            raise ValueError(f"SSF wraps linear layers; '{current_key}' is a {type(target).__name__}")
        layer = SSFLayer(target, adapter_name, peft_config.inference_mode)
        self._replace_module(parent, target_name, layer, target)
