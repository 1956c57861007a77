"""Every method on every kind of quantised base: it trains, travels and reloads, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedpeft.config.run_file import build_run
from fedpeft.config.sections import ModelSection, PeftSection
from fedpeft.errors import ModelError
from fedpeft.models.attach import attach
from fedpeft.models.base_model import load_base
from fedpeft.models.export import export_adapter, load_adapter, merge_adapter
from fedpeft.models.methods import METHODS, base_refusal
from fedpeft.models.quantization import quantization_of
from fedpeft.models.trainable import (
    count_parameters,
    digest_frozen,
    get_arrays,
    set_arrays,
    trainable_parameters,
)
from fedpeft.planning.preflight import problems_of
from tests.models.tiny import batch, logits, saved, tiny_base

pytest.importorskip("bitsandbytes", reason="needs the extra 'quant'")
KINDS = ("nf4", "fp4", "int8", "rtn8", "rtn4")

# bitsandbytes warns at each 8-bit product on the CPU that it casts to float16.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

FAST = {"lora", "peqa", "ia3", "prefix"}


def marks(name: str, kind: str) -> list[pytest.MarkDecorator]:
    """A few methods on every base in seconds, all on two bases in the long run, the rest on request."""
    if name in FAST:
        return []
    return [pytest.mark.slow] if kind in ("nf4", "rtn4") else [pytest.mark.slow, pytest.mark.exhaustive]


CASES = [
    pytest.param(name, kind, id=f"{name}-{kind}", marks=marks(name, kind))
    for name in METHODS
    for kind in KINDS
    if not METHODS[name].needs_bias and base_refusal(METHODS[name], kind) is None
]
REFUSED = [
    pytest.param(name, kind, id=f"{name}-{kind}")
    for name in METHODS
    for kind in ("none", *KINDS)
    if base_refusal(METHODS[name], kind) is not None
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("llama"))


def quantised(folder: Path, kind: str, dtype: str = "float32") -> nn.Module:
    return load_base(ModelSection.model_validate({"path": str(folder), "quantization": kind, "dtype": dtype}))


def stepped(model: nn.Module, steps: int = 3) -> list[float]:
    """Losses of a few steps of training."""
    optimizer = torch.optim.Adam(trainable_parameters(model).values(), lr=1e-3)
    losses = []
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch("llama")).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_is_known_counted_unpacked_and_near_the_real_one(folder: Path, kind: str) -> None:
    base = quantised(folder, kind)
    assert quantization_of(base) == kind
    assert count_parameters(base)[1] == sum(p.numel() for p in tiny_base("llama").parameters())
    exact, rough = logits(tiny_base("llama"), "llama"), logits(base, "llama")
    error = float((exact - rough).norm() / exact.norm())
    assert 1e-4 < error < 0.5


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_method_trains_travels_and_reloads_with_equal_logits(
    folder: Path, name: str, kind: str, tmp_path: Path
) -> None:
    section = PeftSection(method=name)
    model = attach(quantised(folder, kind), section, task="causal-lm", seed=1)
    digest = digest_frozen(model)
    losses = stepped(model)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None for p in trainable_parameters(model).values())
    trained = logits(model, "llama")
    assert digest_frozen(model) == digest  # neither training nor evaluation touches what is frozen
    receiver = attach(quantised(folder, kind), section, task="causal-lm", seed=1)
    assert digest_frozen(receiver) == digest
    set_arrays(receiver, get_arrays(model))
    assert torch.equal(logits(receiver, "llama"), trained)
    export_adapter(model, tmp_path, base_name="x")
    assert torch.equal(logits(load_adapter(quantised(folder, kind), tmp_path), "llama"), trained)


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_a_method_that_cannot_is_refused_by_name_before_anything_loads(name: str, kind: str) -> None:
    tables = {
        "run": {"name": "refused", "rounds": 1},
        "model": {"path": "/no/such/folder", "quantization": kind},
        "peft": {"method": name},
    }
    said = [line for line in problems_of(build_run(tables, source="test")) if "model.quantization: " in line]
    assert len(said) == 1
    assert f"{name} on {kind}: " in said[0]
    assert "set model.quantization" in said[0]


@pytest.mark.parametrize(
    ("name", "kind"), [("pissa", "nf4"), ("loha", "fp4"), ("dora", "rtn4"), ("full", "int8")]
)
def test_attaching_refuses_as_well(folder: Path, name: str, kind: str) -> None:
    with pytest.raises(ModelError, match=f"'{name}' is refused on a {kind} base") as caught:
        attach(quantised(folder, kind), PeftSection(method=name), task="causal-lm", seed=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_low_rank_updates_are_not_merged_into_quantised_weights(folder: Path, kind: str) -> None:
    model = attach(quantised(folder, kind), PeftSection(method="lora"), task="causal-lm", seed=1)
    with pytest.raises(ModelError, match="would round the adapter away"):
        merge_adapter(model)


@pytest.mark.parametrize("kind", ["nf4", "rtn4"])
def test_gradient_checkpointing_changes_no_gradient(folder: Path, kind: str) -> None:
    found = []
    for checkpointed in (False, True):
        base: Any = quantised(folder, kind)
        if checkpointed:
            base.activation_checkpointing_enable({"use_reentrant": False})
            base.config.use_cache = False
        model = attach(base, PeftSection(method="lora"), task="causal-lm", seed=1)
        model.train()(**batch("llama")).loss.backward()
        found.append([p.grad for p in trainable_parameters(model).values()])
    plain, cheap = found
    assert all(
        one is not None and two is not None and torch.equal(one, two)
        for one, two in zip(plain, cheap, strict=True)
    )


def test_the_digest_sees_the_scales(folder: Path) -> None:
    for kind, scale in (
        ("nf4", "absmax"),
        ("int8", "SCB"),
        ("rtn4", "weight_scale"),
        ("rtn8", "weight_zero"),
    ):
        base = quantised(folder, kind)
        digest = digest_frozen(base)
        layer: Any = base.get_submodule("model.layers.0.mlp.up_proj")
        holder = (
            layer if kind.startswith("rtn") else layer.state if kind == "int8" else layer.weight.quant_state
        )
        scales = getattr(holder, scale)
        scales[-1] += 1
        assert digest_frozen(base) != digest


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "rtn4"])
@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_on_a_bfloat16_base_works_or_is_refused(
    folder: Path, name: str, kind: str, tmp_path: Path
) -> None:
    base = quantised(folder, kind, "bfloat16")
    method = METHODS[name]
    mixed = method.trains_base_tensors or not method.quantized_bfloat16
    if method.needs_bias or mixed or base_refusal(method, kind) is not None:
        with pytest.raises(ModelError):
            attach(base, PeftSection(method=name), task="causal-lm", seed=1)
        return
    model = attach(base, PeftSection(method=name), task="causal-lm", seed=1)
    stepped(model, steps=1)
    trained = logits(model, "llama")
    export_adapter(model, tmp_path, base_name="x")
    assert torch.equal(logits(load_adapter(quantised(folder, kind, "bfloat16"), tmp_path), "llama"), trained)
