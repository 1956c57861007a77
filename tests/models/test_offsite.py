"""Emulators: which layers they keep, what trains on them, and where it goes in the full model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedpeft.config.sections import ModelSection, PeftSection
from fedpeft.errors import ModelError
from fedpeft.models.attach import attach
from fedpeft.models.base_model import load_base
from fedpeft.models.distil import distil
from fedpeft.models.export import export_adapter, load_adapter
from fedpeft.models.offsite import (
    Emulator,
    check_source,
    choose_layers,
    emulator_at,
    emulator_of,
    make_emulator,
    plug_in,
    whole_model,
)
from fedpeft.models.trainable import trainable_parameters
from fedpeft.runtime.randomness import stream

DEPTH = 6
IDS = torch.arange(1, 11)[None]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def emulated(full: Path, out: Path, pad: int = 1, middle: int = 2) -> Emulator:
    return make_emulator(whole_model(str(full), "causal-lm"), out, path=str(full), pad=pad, middle=middle)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def load(folder: Path) -> nn.Module:
    return load_base(ModelSection(path=str(folder)))


def test_layers_are_kept_at_even_distances() -> None:
    assert choose_layers(12, pad=2, middle=4) == (0, 1, 2, 4, 7, 9, 10, 11)
    assert choose_layers(24, pad=2, middle=8) == (0, 1, 2, 5, 7, 10, 13, 16, 18, 21, 22, 23)
    assert choose_layers(5, pad=1, middle=1) == (0, 2, 4)
    assert choose_layers(6, pad=1, middle=4) == tuple(range(6))
    for pad, middle in ((0, 2), (3, 1), (1, 5), (1, 0)):
        with pytest.raises(ModelError, match="the model has 6 layers"):
            choose_layers(6, pad=pad, middle=middle)


def test_an_emulator_is_a_model_of_the_kept_layers(full: Path, tmp_path: Path) -> None:
    made = emulated(full, tmp_path / "e")
    assert made.kept == (0, 1, 4, 5)
    assert made.outer == {0, 3}
    base, whole = load(tmp_path / "e"), load(full)
    assert emulator_of(base) == emulator_at(tmp_path / "e") == made
    assert emulator_at(full) is None
    for place, number in enumerate(made.kept):
        for name, weight in whole.get_submodule(f"model.layers.{number}").state_dict().items():
            assert torch.equal(base.get_submodule(f"model.layers.{place}").state_dict()[name], weight)
    held = sum(p.numel() for p in base.parameters())
    assert held < sum(p.numel() for p in whole.parameters())


def test_an_emulator_of_all_layers_is_the_model(full: Path, tmp_path: Path) -> None:
    emulated(full, tmp_path / "e", middle=DEPTH - 2)
    assert torch.equal(logits(load(tmp_path / "e")), logits(load(full)))


@pytest.mark.parametrize(
    "peft",
    [
        {"method": "lora", "r": 2},
        {"method": "lora", "r": 2, "target_modules": ["q_proj"]},
        {"method": "ia3"},
        {"method": "full"},
        {"method": "ln-tuning"},
    ],
)
def test_what_was_trained_lands_on_the_same_layers_of_the_full_model(
    full: Path, tmp_path: Path, peft: dict[str, object]
) -> None:
    """Layers 0 and 3 of the emulator are 0 and 5 of the full model, with what was trained on them."""
    made = emulated(full, tmp_path / "e")
    model = attach(load(tmp_path / "e"), PeftSection.model_validate(peft), task="causal-lm", seed=0)
    parameters = trainable_parameters(model)
    assert {made.layer_of(name) for name in parameters} - {None} == {0, 3}
    draws = torch.Generator().manual_seed(1)
    for parameter in parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draws)
    export_adapter(model, tmp_path / "adapter", base_name="emulator")
    plug_in(tmp_path / "adapter", tmp_path / "plugged", made, base_name=str(full))

    same = load(tmp_path / "e")  # the full model's outer layers with the emulator's middle are the emulator
    whole = load(full)
    plugged = load_adapter(whole, tmp_path / "plugged")
    layers: Any = whole.get_submodule("model.layers")
    whole.set_submodule("model.layers", nn.ModuleList(layers[number] for number in made.kept))
    whole.config.num_hidden_layers = len(made.kept)  # type: ignore[union-attr]
    for place, number in enumerate(made.kept):
        layers[number].self_attn.layer_idx = place
    torch.testing.assert_close(logits(plugged), logits(load_adapter(same, tmp_path / "adapter")))
    assert not torch.equal(logits(plugged), logits(load(tmp_path / "e")))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft calls it
def test_a_plugged_adapter_is_an_ordinary_one(full: Path, tmp_path: Path) -> None:
    made = emulated(full, tmp_path / "e")
    section = PeftSection.model_validate({"method": "lora", "r": 2})
    model = attach(load(tmp_path / "e"), section, task="causal-lm", seed=0)
    export_adapter(model, tmp_path / "adapter", base_name="emulator")
    plug_in(tmp_path / "adapter", tmp_path / "plugged", made, base_name=str(full))
    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(full), str(tmp_path / "plugged"))
    assert torch.equal(logits(theirs.eval()), logits(load(full))), "an untrained adapter changes nothing"


def test_another_model_is_refused(full: Path, tmp_path: Path) -> None:
    made = emulated(full, tmp_path / "e")
    check_source(made, str(full))
    with pytest.raises(ModelError, match="give the model that it was made from"):
        check_source(made, str(tmp_path / "e"))


def test_targets_in_the_middle_alone_are_refused(full: Path, tmp_path: Path) -> None:
    emulated(full, tmp_path / "e")
    section = PeftSection.model_validate({"method": "lora", "target_modules": ["layers.1.self_attn.q_proj"]})
    with pytest.raises(ModelError, match="outer layers"):
        attach(load(tmp_path / "e"), section, task="causal-lm", seed=0)


def test_distilling_moves_the_middle_alone_and_nearer(full: Path, tmp_path: Path) -> None:
    made = emulated(full, tmp_path / "e")
    student, teacher = whole_model(str(tmp_path / "e"), "causal-lm"), whole_model(str(full), "causal-lm")
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    lines = [np.random.default_rng(i).integers(1, 32, 12).tolist() for i in range(8)]
    first, last = distil(student, teacher, made, lines, steps=40, rng=stream(0, "distil"))
    assert last < 0.9 * first
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert {made.layer_of(name) for name in moved} == {1, 2}
    assert not any(p.requires_grad for p in student.parameters())
    with pytest.raises(ModelError, match="0 usable lines"):
        distil(student, teacher, made, [[1]], steps=1, rng=stream(0, "distil"))
