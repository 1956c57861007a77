"""Rounded layers and trained scales against their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from fedpeft.config.sections import ModelSection, PeftSection
from fedpeft.models.attach import attach
from fedpeft.models.base_model import load_base
from fedpeft.models.export import export_adapter, load_adapter, merge_adapter
from fedpeft.models.rounded_linear import Levels, RoundedLinear, levels_of, unpack
from fedpeft.models.rounded_loading import round_layers
from fedpeft.models.trainable import digest_frozen, get_arrays, set_arrays
from fedpeft.models.tuners.peqa import PEQAConfig, PEQALayer
from tests.models.tiny import logits, saved, tiny_base


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(levels: Levels, bias: bool = True, dtype: torch.dtype | None = None) -> RoundedLinear:
    layer = RoundedLinear(8, 6, bias, levels, dtype)
    layer.take(normal(6, 8))
    if bias:
        layer.bias.data = normal(6, seed=1)
    return layer


def test_four_levels_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.0, 2.0, 2.0, 30.0, 15.0, 1.4, 0.0]])
    found = levels_of(weight, Levels(4, 4))
    assert found.scale.tolist() == [[pytest.approx(0.2), 2.0]]
    assert found.zero.tolist() == [[5, 0]]  # 1 / 0.2, and nothing below zero
    codes = [0, 5, 15, 15, 15, 8, 1, 0]  # 15 / 2 = 7.5 goes to the even 8
    packed = [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
    assert found.codes.tolist() == [packed]
    back = unpack(found.codes, found.scale, found.zero, 4)
    assert torch.allclose(back, torch.tensor([[-1.0, 0.0, 2.0, 2.0, 30.0, 16.0, 2.0, 0.0]]))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 2, 4])
def test_no_weight_is_off_by_more_than_a_step(bits: int, group: int | None) -> None:
    weight = normal(2500, 8)  # more rows than one block
    found = levels_of(weight, Levels(bits, group))
    error = (unpack(found.codes, found.scale, found.zero, bits) - weight).abs()
    step = found.scale.repeat_interleave(8 // found.scale.shape[1], dim=1)
    # Half a step by rounding, and half by rounding the zero, where the range's end is cut.
    assert bool((error <= step * 1.0001).all())
    assert float((error <= 0.5001 * step).float().mean()) > 0.85
    assert int(found.codes.max()) <= 255
    zeros = levels_of(torch.zeros(3, 8), Levels(bits, group))
    assert not unpack(zeros.codes, zeros.scale, zeros.zero, bits).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_rounded_layer_is_its_unpacked_weight_in_both_directions(bits: int) -> None:
    layer, x = rounded(Levels(bits, 4)), normal(2, 3, 8, seed=2).requires_grad_(True)
    plain, same = layer.dequantise(), x.detach().clone().requires_grad_(True)
    y, expected = layer(x), plain(same)
    assert torch.allclose(y, expected, atol=1e-6)
    up = normal(2, 3, 6, seed=3)
    y.backward(up)
    expected.backward(up)
    assert x.grad is not None
    assert same.grad is not None
    assert torch.allclose(x.grad, same.grad, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("bits", [4, 8])
def test_gradients_of_scales_are_those_of_the_written_out_formula(bits: int) -> None:
    layer = rounded(Levels(bits, 4), bias=False)
    scale = layer.weight_scale.clone().requires_grad_(True)
    other = layer.weight_scale.clone().requires_grad_(True)
    x, up = normal(5, 8, seed=2), normal(5, 6, seed=3)
    layer.product(x, scale).backward(up)  # type: ignore[no-untyped-call]  # torch annotates it so
    one = unpack(layer.weight, torch.ones_like(scale), layer.weight_zero, bits)  # q - z
    weight = one * other.repeat_interleave(4, dim=1)
    (x @ weight.T).backward(up)  # type: ignore[no-untyped-call]  # torch annotates it so
    assert scale.grad is not None
    assert other.grad is not None
    assert torch.allclose(scale.grad, other.grad, rtol=1e-5, atol=1e-5)


def test_no_unpacked_weight_outlives_the_forward_pass() -> None:
    layer, x = rounded(Levels(8)), normal(3, 8).requires_grad_(True)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(x)
    assert torch.Size((6, 8)) in kept  # the codes, one byte each
    assert all(t.numel() <= 48 for t in kept)
    dtypes: list[torch.dtype] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: dtypes.append(t.dtype) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(x)
    assert dtypes.count(torch.float32) == 2  # the empty stand-in for x, and the scales


def test_bfloat16_inputs_come_out_as_bfloat16_and_autocast_is_followed() -> None:
    layer, x = rounded(Levels(4)), normal(3, 8)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    rough = rounded(Levels(4), dtype=torch.bfloat16)(x)
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, layer(x), rtol=0.05, atol=0.05)
    assert not torch.equal(rough, layer(x))


def test_loading_rounds_as_rounding_in_place_does(tmp_path: Path) -> None:
    section = ModelSection(path=str(saved("llama", tmp_path)), quantization="rtn4", group_size=8)
    here = round_layers(tiny_base("llama"), Levels(4, 8), ["lm_head"])
    assert digest_frozen(load_base(section)) == digest_frozen(here)


@pytest.mark.parametrize("levels", [Levels(4, 8), Levels(8)])
def test_trained_scales_average_exactly_merge_exactly_and_reload(levels: Levels, tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        return round_layers(tiny_base("llama"), levels, ["lm_head"])

    def tuned() -> nn.Module:
        return attach(fresh(), PeftSection(method="peqa"), task="causal-lm", seed=1)

    start = get_arrays(tuned())
    assert sum(a.size for a in start.values()) == sum(
        m.weight_scale.numel() for m in fresh().modules() if isinstance(m, RoundedLinear)
    )
    assert not any(array.any() for array in start.values())
    rng = np.random.default_rng(0)
    one, two = ({k: 0.1 * rng.normal(size=v.shape).astype("f4") for k, v in start.items()} for _ in range(2))

    def merged(arrays: dict[str, Any]) -> nn.Module:
        model = tuned()
        set_arrays(model, arrays)
        return merge_adapter(model)

    models = [merged(arrays) for arrays in (one, two, {k: (one[k] + two[k]) / 2 for k in one})]
    for name, layer in models[0].named_modules():
        assert not isinstance(layer, RoundedLinear | PEQALayer)
        if isinstance(layer, nn.Linear):
            a, b, mean = (m.get_submodule(name).get_parameter("weight") for m in models)
            assert torch.allclose(mean, (a + b) / 2, atol=1e-6)
    model = tuned()
    set_arrays(model, one)
    trained = logits(model, "llama")
    assert torch.equal(logits(models[0], "llama"), trained)
    export_adapter(model, tmp_path / "adapter", base_name="x")
    assert torch.equal(logits(load_adapter(fresh(), tmp_path / "adapter"), "llama"), trained)
    models[0].save_pretrained(tmp_path / "merged")  # type: ignore[operator]  # a transformers model
    plain = load_base(ModelSection(path=str(tmp_path / "merged")))
    assert torch.equal(logits(plain, "llama"), trained)


def test_only_rounded_layers_have_scales_to_train() -> None:
    with pytest.raises(ValueError, match="is a Linear"):
        peft.get_peft_model(nn.Sequential(nn.Linear(3, 3)), PEQAConfig(target_modules=["0"]))
