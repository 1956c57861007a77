"""What is written computes what was trained, and where it doesn't, it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedpeft.commands.export import write_merged
from fedpeft.config.sections import ModelSection, PeftSection
from fedpeft.errors import ModelError
from fedpeft.models.attach import attach
from fedpeft.models.base_model import load_base, load_tokenizer
from fedpeft.models.comparison import draw_token_rows, read_logits, refuse_difference
from fedpeft.models.export import export_adapter, load_adapter
from fedpeft.models.trainable import trainable_parameters
from tests.models.tiny import VOCABULARY, saved, tiny_base

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def moved(section: ModelSection, **options: Any) -> nn.Module:
    """A model whose adapter was moved at random instead of trained."""
    model = attach(load_base(section), PeftSection.model_validate(options), task=section.task, seed=0)
    generator = torch.Generator().manual_seed(3)
    for parameter in trainable_parameters(model).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {"method": "lora", "target_modules": ["lm_head"]}),
        ("llama", {"method": "lora", "target_modules": ["embed_tokens", "q_proj"]}),
        ("llama", {"method": "lora", "target_modules": ["embed_tokens", "lm_head"]}),
        ("llama", {"method": "lora", "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", {"method": "lora", "target_modules": ["q_proj"], "trainable_token_indices": [3, 4]}),
        ("llama", {"method": "dora", "target_modules": ["lm_head", "q_proj"]}),
        ("llama", {"method": "pissa", "target_modules": ["lm_head", "q_proj"]}),
        ("llama", {"method": "head"}),
        ("llama", {"method": "full"}),
        ("mixtral", {"method": "full"}),
        ("mixtral", {"method": "lora"}),
        ("mixtral", {"method": "lora", "target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    ],
    ids=str,
)
def test_adapter_and_merged_model_compute_what_was_trained(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    section = ModelSection(path=str(saved(kind, tmp_path / "base")))
    model = moved(section, **options)
    rows = draw_token_rows(model)
    trained = read_logits(model, rows)
    assert float((trained - read_logits(load_base(section), rows)).abs().max()) > 1e-2
    export_adapter(model, tmp_path / "adapter", base_name="base")
    loaded = load_adapter(load_base(section), tmp_path / "adapter")
    assert float((trained - read_logits(loaded, rows)).abs().max()) < 1e-5

    write_merged(loaded, load_tokenizer(section), (), tmp_path / "merged", section)

    merged = load_base(ModelSection(path=str(tmp_path / "merged")))
    assert float((trained - read_logits(merged, rows)).abs().max()) < 1e-5
    tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight  # type: ignore[operator]
    assert tied == (kind == "llama" and options["method"] == "full")


def test_a_merged_model_that_computes_something_else_is_not_written(tmp_path: Path) -> None:
    section = ModelSection(path=str(saved("llama", tmp_path / "base")))
    model = moved(
        section, method="ssf"
    )  # its shifts are biases, which this architecture's files have no place for

    with pytest.raises(
        ModelError, match="merged model is not the model that was trained: its logits are off by"
    ):
        write_merged(model, load_tokenizer(section), (), tmp_path / "merged", section)

    assert not (tmp_path / "merged").exists()


def test_made_up_rows_stay_inside_the_model() -> None:
    rows = draw_token_rows(tiny_base("llama"))
    assert rows.shape == (4, 12)
    assert int(rows.min()) > 0
    assert int(rows.max()) < VOCABULARY
    assert torch.equal(rows, draw_token_rows(tiny_base("llama")))
    with torch.random.fork_rng(devices=[]):
        section = PeftSection.model_validate({"method": "prompt", "num_virtual_tokens": 60})
        bert = tiny_base("bert")
        model = attach(bert, section, task="sequence-classification", seed=0)
    assert draw_token_rows(model).shape[1] == 64 - 60


def difference(found: float) -> None:
    trained = torch.zeros(2, 3, 4)
    other = trained.clone()
    other[1, 2, 3] = found
    refuse_difference(tiny_base("llama"), trained, other, what="it", keep="all is kept")


def test_a_difference_of_rounding_is_none() -> None:
    difference(0.0)
    difference(5e-5)


@pytest.mark.parametrize("found", [5e-3, float("nan"), float("inf")])
def test_a_difference_is_refused_in_one_line(found: float) -> None:
    with pytest.raises(ModelError, match=r"^it is not the model that was trained: [^\n]*; all is kept$"):
        difference(found)
    with pytest.raises(ModelError, match="another shape"):
        refuse_difference(
            tiny_base("llama"), torch.zeros(2, 3, 4), torch.zeros(1, 3, 4), what="it", keep="all is kept"
        )
