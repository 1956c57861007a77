"""One set of end tokens: what rows end with stops generation here and in every folder that is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from fedpeft.commands.export import write_merged
from fedpeft.config.sections import ModelSection, PeftSection
from fedpeft.data.embedded import model_folder
from fedpeft.models.attach import attach
from fedpeft.models.base_model import load_base, load_tokenizer
from fedpeft.models.export import export_adapter
from fedpeft.models.generation import end_tokens, generate_greedily

OTHER_END = 30  # a letter's token, which no row ends with


def folder_with(tmp_path: Path, **settings: Any) -> ModelSection:
    """The embedded model with generation settings that disagree with its tokenizer."""
    folder = Path(shutil.copytree(model_folder(), tmp_path / "model"))
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return ModelSection(path=str(folder))


def continued(section: ModelSection, prompt: str, most: int = 40) -> list[int]:
    tokenizer, model = load_tokenizer(section), load_base(section)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    new = generate_greedily(
        model, tokenizer, ids, torch.ones_like(ids), max_new_tokens=most, pad_id=int(tokenizer.pad_token_id)
    )
    return [int(token) for token in new[0]]


def a_known_prompt() -> str:
    import numpy as np

    from fedpeft.data.embedded import pretraining_rows

    return pretraining_rows(np.random.default_rng(4), 1)[0].prompt


def test_generation_stops_where_rows_end_whatever_the_settings_say(tmp_path: Path) -> None:
    plain, odd = ModelSection(), folder_with(tmp_path, eos_token_id=OTHER_END, repetition_penalty=1.8)
    end = int(load_tokenizer(plain).eos_token_id)
    found = continued(odd, a_known_prompt())
    assert found == continued(plain, a_known_prompt())  # no penalty either
    assert found[-1] == end
    assert len(found) < 40
    assert end_tokens(load_base(odd), load_tokenizer(odd)) == (end, OTHER_END)


@pytest.mark.parametrize("settings", [OTHER_END, [OTHER_END, 2], None])
def test_every_folder_that_is_written_has_the_set(tmp_path: Path, settings: Any) -> None:
    section = folder_with(tmp_path, eos_token_id=settings)
    tokenizer = load_tokenizer(section)
    model = attach(load_base(section), PeftSection(method="lora", r=2), task="causal-lm", seed=0)
    wanted = set(end_tokens(model.get_base_model(), tokenizer))  # type: ignore[operator]
    assert int(tokenizer.eos_token_id) in wanted
    export_adapter(model, tmp_path / "adapter", base_name="base")
    write_merged(model, tokenizer, (), tmp_path / "merged", section)
    for name in ("adapter", "merged"):
        written = GenerationConfig.from_pretrained(tmp_path / name).eos_token_id
        assert set(written if isinstance(written, list) else [written]) == wanted
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([tokenizer(a_known_prompt())["input_ids"]])
    new = merged.generate(input_ids=ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
    assert int(new[-1]) in wanted
    assert len(new) < 40


def test_a_tokenizer_without_an_end_token_takes_the_models(tmp_path: Path) -> None:
    section = folder_with(tmp_path, eos_token_id=[OTHER_END, 2])
    folder = Path(section.path)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            kept = json.loads((folder / name).read_text())
            kept.pop("eos_token", None)
            (folder / name).write_text(json.dumps(kept))
    assert load_tokenizer(section).eos_token_id == OTHER_END
