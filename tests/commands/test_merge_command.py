"""`fedpeft merge` and `evaluate` with adapters that plain peft wrote."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from fedpeft.config.sections import ModelSection
from fedpeft.errors import ModelError
from fedpeft.models.base_model import load_base
from fedpeft.models.comparison import draw_token_rows, read_logits
from fedpeft.models.export import load_adapter
from fedpeft.models.quiet import quiet
from tests.commands.calling import Call
from tests.models.tiny import saved, tiny_base

EMBEDDING = "base_model.model.model.embed_tokens.weight"


def plain_adapter(folder: Path, seed: int, **more: object) -> torch.Tensor:
    """An adapter as peft itself writes one, with the embedding beside it; the logits of its model."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **more
        )
        model = peft.get_peft_model(tiny_base("llama"), config)
        model.get_input_embeddings().weight.data.add_(0.01 * seed)
        model.save_pretrained(str(folder), save_embedding_layers=True)
    return read_logits(model, draw_token_rows(model))


def test_an_adapter_of_plain_peft_with_its_embedding_is_loaded(tmp_path: Path) -> None:
    section = ModelSection(path=str(saved("llama", tmp_path / "base")))
    wanted = plain_adapter(tmp_path / "a", seed=1)
    assert EMBEDDING in load_file(tmp_path / "a" / "adapter_model.safetensors")

    model = load_adapter(load_base(section), tmp_path / "a")
    assert torch.equal(read_logits(model, draw_token_rows(model)), wanted)


def test_adapters_of_plain_peft_are_merged_and_their_embeddings_averaged(call: Call, tmp_path: Path) -> None:
    plain_adapter(tmp_path / "a", seed=1)
    plain_adapter(tmp_path / "b", seed=3, lora_dropout=0.1)
    config = tmp_path / "b" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "elsewhere"}))

    code, out, err = call(
        "merge",
        str(tmp_path / "a"),
        str(tmp_path / "b"),
        "--out",
        str(tmp_path / "m"),
        "--method",
        "task-arithmetic",
    )

    assert code == 0, err
    assert "elsewhere: taken for one" in out
    assert "whole weights were merged" in out
    assert "averaged 2 tensors" in out  # the embedding, and the output layer that is tied to it
    parts = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "b", "m")]
    assert torch.allclose(parts[2][EMBEDDING], (parts[0][EMBEDDING] + parts[1][EMBEDDING]) / 2)
    load_adapter(tiny_base("llama"), tmp_path / "m")


def test_a_strange_tensor_is_still_refused(tmp_path: Path) -> None:
    plain_adapter(tmp_path / "a", seed=1)
    other = tmp_path / "a" / "adapter_config.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | {"target_modules": ["k_proj"]}))
    with pytest.raises(ModelError, match="its file"):
        load_adapter(tiny_base("llama"), tmp_path / "a")
