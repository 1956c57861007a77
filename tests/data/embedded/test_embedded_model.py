"""The shipped folder: digest, tokenizer, and what the model can do before any federation."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedpeft.data.embedded import make_federated_rows, model_folder, pretraining_rows, verify_folder
from fedpeft.errors import ModelError

TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40)


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_folder())


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder()).eval()


def greedy(prompts: list[str]) -> list[str]:
    """What the model generates: left padding and `generate`, the way a user would."""
    inputs = tokenizer()(prompts, return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        out = model().generate(**inputs, max_new_tokens=32)
    texts: list[str] = tokenizer().batch_decode(
        out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return texts


def test_the_folder_is_small_and_complete() -> None:
    names = {path.name for path in model_folder().iterdir()}
    assert names == {
        "config.json",
        "digest.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in model_folder().iterdir()) < 4_000_000


def test_the_weights_are_finite_fp32() -> None:
    with safe_open(model_folder() / "model.safetensors", framework="pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118 - not a mapping
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors)
    assert 500_000 < sum(tensor.numel() for tensor in tensors) < 1_000_000


def test_a_changed_weight_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model_folder(), tmp_path / "model"))
    assert verify_folder(folder) == folder
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(ModelError, match="sha256") as raised:
        verify_folder(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("digest", ["", "[]", "{}", "1"])
def test_an_unreadable_digest_is_refused(tmp_path: Path, digest: str) -> None:
    (tmp_path / "digest.json").write_text(digest, encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be checked"):
        verify_folder(tmp_path)


def test_missing_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "digest.json").write_text(json.dumps({"model.safetensors": "0"}), encoding="utf-8")
    with pytest.raises(ModelError, match="FileNotFoundError"):
        verify_folder(tmp_path)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_every_text_comes_back(text: str) -> None:
    ids = tokenizer()(text)["input_ids"]
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer().decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize(
    "text", ["</s>", "<s>a<pad>", " don 't , no .", "  \r\n\t", "", "caf\u00e9 \U0001f600"]
)
def test_texts_that_tokenizers_like_to_change_come_back(text: str) -> None:
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert tokenizer().decode(ids, skip_special_tokens=True) == text
    assert not {0, 1, 2} & set(ids)


def test_only_the_start_token_is_added() -> None:
    assert (tokenizer().pad_token_id, tokenizer().bos_token_id, tokenizer().eos_token_id) == (0, 1, 2)
    ids = tokenizer()("ab")["input_ids"]
    assert ids[0] == 1
    assert ids[1:] == tokenizer()("ab", add_special_tokens=False)["input_ids"]
    assert len(tokenizer()) == model().config.vocab_size == 259


def test_the_model_solves_the_public_skills_and_knows_nothing_of_the_private_families() -> None:
    known = pretraining_rows(np.random.default_rng(2026), 160)
    said = greedy([row.prompt for row in known])
    right: dict[str, list[bool]] = {}
    for row, text in zip(known, said, strict=True):
        right.setdefault(row.family, []).append(text == row.answer)
    rates = {family: float(np.mean(hits)) for family, hits in right.items()}
    assert np.mean(list(rates.values())) >= 0.9, rates
    assert min(rates.values()) >= 0.6, rates

    private = make_federated_rows(0, test_per_client=10)[1]
    hits = [
        text == row.answer for row, text in zip(private, greedy([r.prompt for r in private]), strict=True)
    ]
    assert np.mean(hits) <= 0.05
