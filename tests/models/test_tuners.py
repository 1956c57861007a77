"""Our two tuners against their formulas."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

from fedpeft.models.tuners import OWN_CONFIGS
from fedpeft.models.tuners.bottleneck import BottleneckConfig, BottleneckLayer
from fedpeft.models.tuners.ssf import SSFConfig, SSFLayer


def linear(bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(5, 3, bias=bias)


@pytest.mark.parametrize("bias", [True, False])
def test_ssf_scales_and_shifts_each_output_and_merges_into_the_layer(bias: bool) -> None:
    layer = SSFLayer(copy.deepcopy(linear(bias)), "default", inference_mode=False)
    layer.ssf_scale["default"].data = torch.tensor([2.0, 0.0, -1.0])
    layer.ssf_shift["default"].data = torch.tensor([0.5, 1.0, 0.0])
    x = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(1))
    expected = linear(bias)(x) * torch.tensor([2.0, 0.0, -1.0]) + torch.tensor([0.5, 1.0, 0.0])
    assert torch.equal(layer(x), expected)
    layer.merge()
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert torch.allclose(layer.base_layer(x), expected, atol=1e-6)


def test_a_bottleneck_adds_a_small_network_of_the_output() -> None:
    config = BottleneckConfig(bottleneck_size=2, non_linearity="relu")
    layer = BottleneckLayer(linear(), "default", config)
    down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    h = linear()(x)
    assert torch.equal(layer(x), h)
    assert isinstance(down, nn.Linear)
    assert isinstance(up, nn.Linear)
    nn.init.normal_(up.weight)
    nn.init.normal_(up.bias)
    inner = (h @ down.weight.T + down.bias).clamp(min=0)
    assert torch.allclose(layer(x), h + inner @ up.weight.T + up.bias, atol=1e-6)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), h)


def test_the_down_projection_has_the_asked_spread() -> None:
    torch.manual_seed(3)
    layer = BottleneckLayer(
        nn.Linear(4, 1000), "default", BottleneckConfig(bottleneck_size=100, init_std=0.3)
    )
    weight = layer.bottleneck_down["default"].get_parameter("weight").detach()
    # 100,000 normals: the standard error of their spread is 0.3 / sqrt(200,000) = 0.0007; six of these.
    assert float(weight.std()) == pytest.approx(0.3, abs=0.004)


def test_bfloat16_layers_stay_bfloat16_outside() -> None:
    for layer in (
        SSFLayer(linear().bfloat16(), "default", inference_mode=False),
        BottleneckLayer(linear().bfloat16(), "default", BottleneckConfig()),
    ):
        assert layer(torch.randn(2, 5).bfloat16()).dtype == torch.bfloat16
        assert all(
            p.dtype == torch.float32 for name, p in layer.named_parameters() if "base_layer" not in name
        )


@pytest.mark.parametrize("values", [{"bottleneck_size": 0}, {"non_linearity": "step"}])
def test_a_bottleneck_that_cannot_be(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        BottleneckConfig(**values)


def test_peft_knows_both_by_their_type() -> None:
    for config in (SSFConfig, BottleneckConfig):
        assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[config.TYPE] is config
        assert config in OWN_CONFIGS.values()


@pytest.mark.parametrize("config", [SSFConfig, BottleneckConfig])
def test_only_linear_layers_can_be_wrapped(config: type) -> None:
    with pytest.raises(ValueError, match="is a Embedding"):
        peft.get_peft_model(nn.Sequential(nn.Embedding(3, 3)), config(target_modules=["0"]))
