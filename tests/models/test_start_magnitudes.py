"""The smallest weights of tensors that begin at zero are chosen by the base, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedpeft.config.sections import PeftSection
from fedpeft.errors import ModelError
from fedpeft.models.attach import attach
from fedpeft.models.rounded_linear import Levels
from fedpeft.models.rounded_loading import round_layers
from fedpeft.models.start_magnitudes import start_magnitudes
from fedpeft.models.trainable import trainable_parameters
from fedpeft.seedspace.layout import tensor_ids
from fedpeft.seedspace.supports import smallest_weights
from tests.models.tiny import tiny_base


def model_of(base: nn.Module | None = None, **options: Any) -> nn.Module:
    section = PeftSection.model_validate(options)
    return attach(base or tiny_base("llama"), section, task="causal-lm", seed=0)


@pytest.mark.parametrize("rounded", [False, True])
def test_zero_factors_are_chosen_by_the_bases_product(rounded: bool) -> None:
    base = round_layers(tiny_base("llama"), Levels(8, 16), ["lm_head"]) if rounded else None
    model = model_of(base, method="lora", r=4, target_modules=["q_proj", "down_proj"])
    support = smallest_weights(model, 0.25, start_magnitudes(model))
    parameters = trainable_parameters(model)
    ids = tensor_ids(parameters)
    for name, parameter in parameters.items():
        if ".lora_B." not in name:
            continue
        layer: Any = model.get_submodule(name.split(".lora_B.")[0])
        zeros = torch.zeros(1, layer.in_features)
        with torch.no_grad():  # W A^T by the layer's own product
            product = (layer.base_layer(layer.lora_A["default"].weight) - layer.base_layer(zeros)).t().abs()
        mask = support.mask(ids[name]).reshape(parameter.shape)
        assert int(mask.sum()) == parameter.numel() // 4
        assert float(product[mask].max()) <= float(product[~mask].min()) + 1e-6
        assert len(set(mask.nonzero()[:, 0].tolist())) > parameter.shape[0] // 4  # not the first rows alone


def test_an_embeddings_zero_factor_has_its_product_too() -> None:
    model = model_of(method="lora", r=4, target_modules=["embed_tokens"])
    ((name, found),) = start_magnitudes(model).items()
    layer: Any = model.get_submodule(name.split(".lora_embedding_A")[0])
    expected = (layer.base_layer.weight.double() @ layer.lora_embedding_B["default"].double()).t().abs()
    assert torch.allclose(found, expected)


def test_weights_that_differ_stand_for_themselves() -> None:
    model = model_of(method="full")
    assert start_magnitudes(model) == {}
    assert start_magnitudes(model_of(method="lora", init_lora_weights=False)) == {}


def test_biases_beside_matrices_do_not_stop_a_run() -> None:
    base = tiny_base("llama")
    base.get_submodule("model.norm").get_parameter("weight").data.fill_(1.0)
    (name,) = start_magnitudes(model_of(base, method="full"))
    assert "norm" in name


@pytest.mark.parametrize("method", ["ia3", "ssf", "miss"])
def test_an_adapter_that_begins_all_alike_is_refused(method: str) -> None:
    with pytest.raises(ModelError, match=r"moves the smallest weights, and those of .* begin all alike"):
        start_magnitudes(model_of(method=method))
