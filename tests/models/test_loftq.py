"""LoftQ starts: nearer to the full-precision model than a plain one, the same for all, and reloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedpeft.config.run_file import build_run
from fedpeft.config.sections import ModelSection, PeftSection
from fedpeft.errors import ModelError
from fedpeft.models.attach import attach
from fedpeft.models.base_model import load_base
from fedpeft.models.export import export_adapter, load_adapter
from fedpeft.models.loftq import KINDS, decompose, without
from fedpeft.models.rounded_linear import Levels, levels_of, unpack
from fedpeft.models.rounded_loading import round_layers
from fedpeft.models.trainable import digest_frozen, get_arrays, trainable_parameters
from fedpeft.planning.preflight import problems_of
from tests.models.tiny import batch, logits, saved, tiny_base

pytest.importorskip("bitsandbytes", reason="needs the extra 'quant'")
RANK = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("llama"))


def base(folder: Path, kind: str) -> nn.Module:
    return load_base(ModelSection.model_validate({"path": str(folder), "quantization": kind}))


def started(folder: Path, kind: str, turns: int, method: str = "lora") -> nn.Module:
    options: dict[str, Any] = {"method": method, "r": RANK, "lora_alpha": 16}
    if turns:
        options |= {"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": turns}}
    return attach(base(folder, kind), PeftSection.model_validate(options), task="causal-lm", seed=1)


def effective(model: nn.Module) -> dict[str, torch.Tensor]:
    """Effective weight of every adapted layer, measured by what it makes of unit vectors."""
    found = {}
    with torch.no_grad():
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
                found[name.removeprefix("base_model.model.")] = module(torch.eye(module.in_features)).T
    return found


def errors(model: nn.Module) -> dict[str, float]:
    """Frobenius distance of each layer's effective weight from the full-precision one."""
    exact = tiny_base("llama")
    return {
        name: float((weight - exact.get_submodule(name).get_parameter("weight")).norm())
        for name, weight in effective(model).items()
    }


def four_bits(weight: torch.Tensor) -> torch.Tensor:
    found = levels_of(weight, Levels(4, 8))
    return unpack(found.codes, found.scale, found.zero, 4)


def test_one_iteration_leaves_what_no_rank_can_reach() -> None:
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    found = decompose(weight, four_bits, 3, 1)
    residual = weight - four_bits(weight)
    rest = np.linalg.svd(residual.double().numpy(), compute_uv=False)[3:]
    assert found.error == pytest.approx(float(np.sqrt((rest**2).sum())), rel=1e-4)
    assert float((residual - found.up @ found.down).norm()) == pytest.approx(found.error, rel=1e-4)
    assert found.removed is None


def test_more_iterations_are_never_worse_and_the_best_is_kept() -> None:
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    seen = []
    for turns in (1, 2, 5, 20):
        found = decompose(weight, four_bits, 3, turns)
        actual = weight - four_bits(without(weight, found.removed)) - found.up @ found.down
        assert float(actual.norm()) == pytest.approx(found.error, rel=1e-4)
        seen.append(found.error)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < seen[0]
    with pytest.raises(ModelError, match="at least 1"):
        decompose(weight, four_bits, 3, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "rslora", "ffa-lora"])
def test_a_start_is_nearer_to_full_precision_than_a_plain_one(folder: Path, kind: str, method: str) -> None:
    plain, once, thrice = (errors(started(folder, kind, turns, method)) for turns in (0, 1, 3))
    assert len(plain) == 14
    assert all(once[name] < 0.95 * plain[name] for name in plain)
    assert sum(thrice.values()) <= 1.0001 * sum(once.values())
    exact = logits(tiny_base("llama"), "llama")
    rough, near = (
        float((logits(started(folder, kind, turns, method), "llama") - exact).norm()) for turns in (0, 1)
    )
    assert near < rough


@pytest.mark.parametrize("kind", ["nf4", "rtn4"])
def test_all_clients_start_alike_and_one_iteration_leaves_the_base_alone(folder: Path, kind: str) -> None:
    for turns in (1, 3):
        one, two = started(folder, kind, turns), started(folder, kind, turns)
        assert digest_frozen(one) == digest_frozen(two)
        arrays, others = get_arrays(one), get_arrays(two)
        assert all(np.array_equal(arrays[name], others[name]) for name in arrays)
        assert (digest_frozen(one) == digest_frozen(started(folder, kind, 0))) == (turns == 1)


@pytest.mark.parametrize("kind", ["nf4", "rtn4"])
@pytest.mark.parametrize("turns", [1, 3])
def test_a_trained_start_reloads_with_equal_logits(
    folder: Path, kind: str, turns: int, tmp_path: Path
) -> None:
    model = started(folder, kind, turns)
    optimizer = torch.optim.Adam(trainable_parameters(model).values(), lr=1e-3)
    model(**batch("llama")).loss.backward()
    optimizer.step()
    trained = logits(model, "llama")
    export_adapter(model, tmp_path, base_name="x")
    assert torch.equal(logits(load_adapter(base(folder, kind), tmp_path), "llama"), trained)


@pytest.mark.parametrize(
    ("quantization", "peft", "said"),
    [
        ("none", {}, "starts from a quantised base"),
        ("int8", {}, "starts from a quantised base"),
        ("nf4", {"method": "dora"}, "works for lora, rslora, ffa-lora, not for 'dora'"),
        ("nf4", {"loftq_config": {"loftq_iter": 0}}, "loftq_iter is 0"),
        ("nf4", {"loftq_config": {"loftq_bits": 4}}, "takes loftq_iter alone"),
        (
            "nf4",
            {"init_lora_weights": True, "loftq_config": {"loftq_iter": 1}},
            "needs peft.init_lora_weights",
        ),
    ],
)
def test_what_cannot_be_is_said_before_anything_loads(
    quantization: str, peft: dict[str, Any], said: str
) -> None:
    tables = {
        "run": {"name": "x", "rounds": 1},
        "model": {"path": "/no/such/folder", "quantization": quantization},
        "peft": {"method": "lora", "init_lora_weights": "loftq", **peft},
    }
    assert [line for line in problems_of(build_run(tables, source="test")) if said in line]


def test_a_base_without_files_is_refused() -> None:
    rounded = round_layers(tiny_base("llama"), Levels(4, 8), ["lm_head"])
    section = PeftSection.model_validate({"method": "lora", "init_lora_weights": "loftq"})
    with pytest.raises(ModelError, match="not loaded from files"):
        attach(rounded, section, task="causal-lm", seed=1)
