"""Starts that were computed elsewhere: the same model, without singular vectors of one's own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from fedpeft.config.sections import ModelSection, PeftSection
from fedpeft.errors import ModelError
from fedpeft.models.attach import attach
from fedpeft.models.base_model import load_base
from fedpeft.models.export import export_adapter
from fedpeft.models.loftq import without
from fedpeft.models.starts import decomposition_bytes, decomposition_of, start_of_model
from fedpeft.models.trainable import digest_frozen, get_arrays
from fedpeft.reporting.snippet import load_snippet
from tests.models.tiny import logits, saved

LQ: dict[str, Any] = {"init_lora_weights": "lq-lora", "loftq_config": {"loftq_iter": 2}}
LOFTQ: dict[str, Any] = {"init_lora_weights": "loftq"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("llama"))


def attached(folder: Path, start_bytes: bytes = b"", **peft: Any) -> nn.Module:
    section = ModelSection(path=str(folder), quantization="rtn4", group_size=8)
    options = {"method": "lora", "r": 4, **peft}
    base = load_base(section)
    return attach(
        base, PeftSection.model_validate(options), task="causal-lm", seed=1, start_bytes=start_bytes
    )


def same(one: nn.Module, two: nn.Module) -> bool:
    first, second = get_arrays(one), get_arrays(two)
    return digest_frozen(one) == digest_frozen(two) and all(
        np.array_equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize("peft", [LQ, LOFTQ], ids=["lq-lora", "loftq"])
def test_what_came_gives_the_model_that_it_came_from(folder: Path, peft: dict[str, Any]) -> None:
    computed = attached(folder, **peft)
    content = start_of_model(computed)
    assert content == decomposition_bytes(decomposition_of(content))
    received = attached(folder, content, **peft)
    assert same(received, computed)
    assert start_of_model(received) == content, "it can be handed on"


def test_what_came_is_used_and_not_computed_again(folder: Path) -> None:
    content = start_of_model(attached(folder, **LQ))
    halved = {
        name: replace(each, up=each.up / 2, removed=None) for name, each in decomposition_of(content).items()
    }
    model = attached(folder, decomposition_bytes(halved), **LQ)
    ours, theirs = get_arrays(model), get_arrays(attached(folder, content, **LQ))
    ups = [name for name in ours if ".lora_B." in name]
    assert len(ups) == 14
    assert all(np.array_equal(ours[name], theirs[name] / 2) for name in ups)
    assert digest_frozen(model) == digest_frozen(attached(folder)), "nothing was taken out: the plain codes"


def test_without_a_start_there_is_nothing_to_hand_on(folder: Path) -> None:
    assert start_of_model(attached(folder)) == b""


def test_foreign_starts_are_refused(folder: Path) -> None:
    content = start_of_model(attached(folder, **LQ))
    known = decomposition_of(content)
    name, one = next(iter(known.items()))
    fewer = decomposition_bytes({key: each for key, each in known.items() if key != name})
    narrow = decomposition_bytes({**known, name: replace(one, up=one.up[:, :2])})
    broken = decomposition_bytes({**known, name: replace(one, up=one.up * float("nan"))})
    for bad, said in (
        (fewer, f"'{name}' is in one of them"),
        (narrow, "it is of another model or rank"),
        (broken, "no finite float32 factor"),
        (content[:100], "cannot be read: 100 bytes"),
        (save({f"{name}/up": one.up}), "factors are missing"),
    ):
        with pytest.raises(ModelError, match=said) as refusal:
            attached(folder, bad, **LQ)
        assert "\n" not in str(refusal.value)


def test_what_is_quantised_has_the_same_bits_in_any_order_of_sums() -> None:
    draws = torch.Generator().manual_seed(0)
    weight, up, down = (torch.randn(shape, generator=draws) for shape in ((3000, 40), (3000, 64), (64, 40)))
    exact = weight.double() - up.double() @ down.double()
    turned = torch.randperm(64, generator=draws)
    ours = without(weight, (up, down))
    assert torch.equal(ours, without(weight, (up[:, turned], down[turned])))
    assert torch.equal(ours, exact.float())
    assert without(weight, None) is weight


def test_the_lines_that_load_an_adapter_make_its_base_again(folder: Path, tmp_path: Path) -> None:
    model = attached(folder, **LQ)
    export_adapter(model, tmp_path, base_name=str(folder))
    tables = {
        "model": {"path": str(folder), "quantization": "rtn4", "group_size": 8, "device": "cuda"},
        "peft": {"method": "lora", **LQ},
    }
    told: dict[str, Any] = {}
    exec(load_snippet(tables, str(tmp_path)), told)
    assert torch.equal(logits(told["model"], "llama"), logits(model, "llama"))
    assert "PeftModel" in load_snippet({"model": {"path": str(folder)}, "peft": {"method": "lora"}})
