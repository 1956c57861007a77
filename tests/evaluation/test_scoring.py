"""Scores of a real model: against one row at a time, and against generation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedpeft.config.sections import ModelSection
from fedpeft.data.embedded import pretraining_rows
from fedpeft.data.encoded import Encoded, Texts, offsets_of
from fedpeft.evaluation.scoring import generate, score
from fedpeft.models.base_model import Tokenizer, load_base, load_tokenizer
from fedpeft.training.first_order import Rows


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(ModelSection())


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_base(ModelSection())


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer) -> Rows:
    """Twelve rows that the embedded model knows, and one answer that it can't."""
    drawn = pretraining_rows(np.random.default_rng(4), 12)
    prompts = [tokenizer(row.prompt)["input_ids"] for row in drawn]
    answers = [row.answer for row in drawn]
    answers[5] = "no model says this"
    ends = [[*tokenizer(a, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for a in answers]
    lines = [[*prompt, *end] for prompt, end in zip(prompts, ends, strict=True)]
    encoded = Encoded(
        np.concatenate([np.array(line, dtype=np.int32) for line in lines]),
        offsets_of([len(line) for line in lines]),
        np.array([len(prompt) for prompt in prompts], dtype=np.int32),
        None,
        Texts.pack(answers),
    )
    return Rows(encoded, np.arange(12, dtype=np.int64), "causal-lm", int(tokenizer.pad_token_id))


def test_columns_equal_one_row_at_a_time(model: torch.nn.Module, tokenizer: Tokenizer, rows: Rows) -> None:
    batches = [np.arange(0, 5), np.arange(5, 12)]
    came = score(model, tokenizer, rows, batches, ("loss",), max_new_tokens=1)
    for index in range(12):
        line = torch.from_numpy(rows.encoded.row(index).astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=line[None]).logits[0].double()
        start = int(rows.encoded.answer_start[index])
        nll = functional.cross_entropy(logits[start - 1 : -1], line[start:], reduction="sum")
        assert came["nll"][index] == pytest.approx(float(nll), rel=1e-4, abs=1e-4)
        assert came["tokens"][index] == len(line) - start


def test_exact_match_without_generating_equals_generating(
    model: torch.nn.Module, tokenizer: Tokenizer, rows: Rows
) -> None:
    came = score(model, tokenizer, rows, [rows.indices], ("exact-match", "rouge-l"), max_new_tokens=40)
    texts = generate(model, tokenizer, rows, rows.indices, max_new_tokens=40)
    answers = [rows.encoded.answers[i] for i in range(12)] if rows.encoded.answers else []
    expected = [float(text == answer) for text, answer in zip(texts, answers, strict=True)]
    assert came["exact"].tolist() == expected
    assert 0 < sum(expected) < 12, "both cases occur"
    assert all(
        came["rouge_l"][i] == 1.0 for i in range(12) if expected[i] and any(map(str.isalnum, answers[i]))
    )
    assert came["rouge_l"][5] < 1.0


def test_a_row_without_a_prompt_scores_by_an_empty_text(
    model: torch.nn.Module, tokenizer: Tokenizer, rows: Rows
) -> None:
    starts = rows.encoded.answer_start.copy()
    starts[[1, 4]] = 0
    encoded = Encoded(rows.encoded.input_ids, rows.encoded.offsets, starts, None, rows.encoded.answers)
    odd = Rows(encoded, rows.indices, rows.task, rows.pad_id)
    wanted = generate(model, tokenizer, rows, np.array([0, 2, 3, 5]), max_new_tokens=30)
    found = generate(model, tokenizer, odd, np.arange(6), max_new_tokens=30)
    assert found == [wanted[0], "", wanted[1], wanted[2], "", wanted[3]]
    assert generate(model, tokenizer, odd, np.array([1, 4]), max_new_tokens=30) == ["", ""]
    came = score(model, tokenizer, odd, [np.arange(6)], ("rouge-l",), max_new_tokens=30)
    assert came["rouge_l"][[1, 4]].tolist() == [0.0, 0.0]
