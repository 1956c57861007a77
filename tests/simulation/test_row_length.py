"""Rows, virtual tokens and generated text that don't fit a model's positions are refused at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fedpeft.config.run_file import build_run
from fedpeft.errors import ModelError
from fedpeft.planning.plan import make_plan
from tests.models.tiny import VOCABULARY, tiny_tokenizer
from tests.simulation.runs import simulated

POSITIONS = 40


@pytest.fixture
def short_model(tmp_path: Path) -> Path:
    """The folder of a language model with 40 learned positions."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        n_embd=16,
        n_layer=1,
        n_head=2,
        bos_token_id=1,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt")
    return tmp_path / "gpt"


def tables_of(folder: Path, max_length: int, **more: Any) -> dict[str, Any]:
    rows = folder.parent / "rows.jsonl"
    long = " ".join(f"w{n}" for n in range(2, 90))
    rows.write_text("".join(f'{{"q": "w{n} {long}", "a": "w{n + 2}"}}\n' for n in range(3, 30)))
    return {
        "run": {"name": "long", "rounds": 1},
        "model": {"path": str(folder)},
        "data": {
            "train": str(rows),
            "prompt": "{q} ",
            "answer": "{a}",
            "max_length": max_length,
            "partitioner": {"kind": "iid", "clients": 2},
        },
        "training": {"steps": 1, "batch_size": 4},
        "evaluation": {"metrics": ["loss"], "baselines": False},
    } | more


GENERATED = {"metrics": ["rouge-l"], "max_new_tokens": 8, "baselines": False}
PROMPT = {"method": "prompt", "num_virtual_tokens": 4}


@pytest.mark.parametrize(
    ("max_length", "more", "said"),
    [
        (POSITIONS + 1, {}, f"has {POSITIONS} positions, fewer than data.max_length {POSITIONS + 1} take"),
        (
            POSITIONS - 7,
            {"evaluation": GENERATED},
            "and 8 generated ones .*set data.max_length to 32 or less",
        ),
        (POSITIONS - 3, {"peft": PROMPT}, "and 4 virtual tokens .*set data.max_length to 36 or less"),
        (POSITIONS, {"peft": PROMPT | {"num_virtual_tokens": 39}}, "and 39 virtual tokens .*set these lower"),
    ],
)
def test_what_does_not_fit_is_refused_by_plan_and_run(
    max_length: int, more: dict[str, Any], said: str, short_model: Path, tmp_path: Path
) -> None:
    tables = tables_of(short_model, max_length, **more)
    with pytest.raises(ModelError, match=said) as refused:
        simulated(tables, tmp_path / "run")
    assert str(refused.value) in make_plan(build_run(tables, source="test")).problems


@pytest.mark.parametrize(
    ("max_length", "more"),
    [(POSITIONS, {}), (POSITIONS - 8, {"evaluation": GENERATED}), (POSITIONS - 4, {"peft": PROMPT})],
)
def test_what_fits_to_the_last_position_runs(
    max_length: int, more: dict[str, Any], short_model: Path, tmp_path: Path
) -> None:
    assert simulated(tables_of(short_model, max_length, **more), tmp_path / "run").summary.finished
