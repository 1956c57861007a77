"""Quantised bases: packed, unchanged by training and evaluation, and refused where a method cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedpeft.config import ModelSection, PeftSection
from fedpeft.errors import ModelError
from fedpeft.models.attach import attach
from fedpeft.models.base import load_base
from fedpeft.models.export import export_adapter, load_adapter, merge_adapter
from fedpeft.models.methods import METHODS
from fedpeft.models.trainable import count_parameters, frozen_digest, trainable_parameters
from tests.models.tiny import batch, logits, saved, tiny_base

pytest.importorskip("bitsandbytes", reason="needs the extra 'quant'")
KINDS = ("nf4", "fp4", "int8")

# bitsandbytes warns at each 8-bit product on the CPU that it casts to float16.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("llama"))


def quantised(folder: Path, kind: str, dtype: str = "float32") -> nn.Module:
    return load_base(ModelSection.model_validate({"path": str(folder), "quantization": kind, "dtype": dtype}))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_unpacked(folder: Path, kind: str) -> None:
    assert count_parameters(quantised(folder, kind))[1] == sum(
        p.numel() for p in tiny_base("llama").parameters()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_near_the_real_ones_and_not_equal(folder: Path, kind: str) -> None:
    exact, rough = logits(tiny_base("llama"), "llama"), logits(quantised(folder, kind), "llama")
    error = float((exact - rough).norm() / exact.norm())
    assert 1e-4 < error < 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_neither_training_nor_evaluation_touches_the_frozen_state(
    folder: Path, kind: str, tmp_path: Path
) -> None:
    model = attach(quantised(folder, kind), PeftSection(method="lora"), task="causal-lm", seed=1)
    digest = frozen_digest(model)
    fresh = logits(model, "llama")
    optimizer = torch.optim.Adam(trainable_parameters(model).values(), lr=1e-2)
    model.train()
    model(**batch("llama")).loss.backward()
    optimizer.step()
    trained = logits(model, "llama")
    assert not torch.equal(fresh, trained)
    assert frozen_digest(model) == digest
    export_adapter(model, tmp_path, base_name="x")
    assert torch.equal(logits(load_adapter(quantised(folder, kind), tmp_path), "llama"), trained)
    with pytest.raises(ModelError, match="would round the adapter away"):
        merge_adapter(model)


def test_the_digest_sees_the_scales(folder: Path) -> None:
    for kind, scale in (("nf4", "absmax"), ("int8", "SCB")):
        base = quantised(folder, kind)
        digest = frozen_digest(base)
        weight: Any = base.get_submodule("model.layers.0.mlp.up_proj").get_parameter("weight")
        holder = weight.quant_state if kind == "nf4" else weight
        scales = getattr(holder, scale)
        scales[-1] += 1
        assert frozen_digest(base) != digest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["pissa", "loha", "lokr", "hra", "full"])
def test_a_method_that_needs_plain_weights_is_refused(folder: Path, kind: str, name: str) -> None:
    with pytest.raises(ModelError, match=f"'{name}' is refused on a {kind} base") as caught:
        attach(quantised(folder, kind), PeftSection(method=name), task="causal-lm", seed=1)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype"), [("nf4", "float32"), ("nf4", "bfloat16"), ("int8", "float32")])
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_works_on_a_quantised_base_or_is_refused(
    folder: Path, name: str, kind: str, dtype: str, tmp_path: Path
) -> None:
    base = quantised(folder, kind, dtype)
    method = METHODS[name]
    mixed = dtype == "bfloat16" and (method.trains_base_tensors or not method.quantized_bfloat16)
    if method.needs_bias or mixed or kind in method.refused_quantization:
        with pytest.raises(ModelError):
            attach(base, PeftSection(method=name), task="causal-lm", seed=1)
        return
    model = attach(base, PeftSection(method=name), task="causal-lm", seed=1)
    digest = frozen_digest(model)
    model.train()
    model(**batch("llama")).loss.backward()
    assert all(p.grad is not None for p in trainable_parameters(model).values())
    trained = logits(model, "llama")
    assert frozen_digest(model) == digest
    export_adapter(model, tmp_path, base_name="x")
    assert torch.equal(logits(load_adapter(quantised(folder, kind, dtype), tmp_path), "llama"), trained)
