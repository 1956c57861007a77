"""The committed pretraining script, on a twin small enough to train in a test."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedpeft.data.embedded import Row, make_federated_rows, model_folder, pretraining_rows, verify_folder
from simulations.pretrain_embedded import (
    IGNORED,
    PretrainSettings,
    batches,
    byte_tokenizer,
    collate,
    encode,
    exact_match,
    lr_factor,
    new_model,
    pretrain,
)

TINY = PretrainSettings(steps=3, hidden=32, layers=1, batch_size=4, threads=1)


def test_only_the_answer_and_the_end_token_carry_labels() -> None:
    tokenizer = byte_tokenizer()
    ids, labels = collate(encode(tokenizer, [Row("ab=>", "c", "x", -1), Row("a\n", "bcd", "x", -1)]))
    assert tokenizer.batch_decode(ids) == ["<s>ab=>c</s>", "<s>a\nbcd</s>"]
    marked = [tokenizer.decode(row[row != IGNORED]) for row in labels]
    assert marked == ["c</s>", "bcd</s>"]


def test_batches_are_counted_and_repeatable() -> None:
    first, second = (list(batches(byte_tokenizer(), TINY, pretraining_rows)) for _ in range(2))
    assert len(first) == TINY.steps
    assert all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True)
    )


def test_new_weights_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    a, b = (new_model(TINY, 259).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    factors = [lr_factor(step, 100) for step in range(100)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(later <= earlier for earlier, later in pairwise(factors[4:]))
    assert 0 < factors[-1] < 0.001


def test_exact_match_agrees_with_generation() -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    model = AutoModelForCausalLM.from_pretrained(model_folder()).eval()
    rows = [*pretraining_rows(np.random.default_rng(7), 20), *make_federated_rows(7, test_per_client=2)[1]]
    inputs = tokenizer([row.prompt for row in rows], return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=40)
    said = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    apart = [Row(row.prompt, row.answer, str(index), -1) for index, row in enumerate(rows)]
    wanted = {str(index): float(said[index] == row.answer) for index, row in enumerate(rows)}
    assert exact_match(model, tokenizer, apart) == wanted
    assert set(wanted.values()) == {0.0, 1.0}


def half_easy_rows(rng: np.random.Generator, count: int) -> list[Row]:
    """Public rows, and as many of a skill so easy that a very small model learns it in seconds."""
    numbers = rng.integers(10, 100, size=count // 2)
    easy = [Row(f"say {number}\n", str(number), "say", -1) for number in numbers]
    return [*pretraining_rows(rng, count - len(easy)), *easy]


@pytest.mark.slow
def test_a_small_twin_learns_and_its_folder_loads(tmp_path: Path) -> None:
    size = PretrainSettings(steps=300, hidden=64, layers=2, batch_size=32, threads=1)
    threads = torch.get_num_threads()
    try:
        report = pretrain(tmp_path / "twin", size, lambda _: None, half_easy_rows)
    finally:
        torch.set_num_threads(threads)
    fresh = half_easy_rows(np.random.default_rng((size.seed, 1)), 1000)
    tokenizer = AutoTokenizer.from_pretrained(verify_folder(tmp_path / "twin"))

    # Log 259 = 5.6 nats is chance; both seeds that were tried fell from 4.8 to below 1.7.
    assert report.last_loss < 0.6 * report.first_loss
    assert exact_match(new_model(size, len(tokenizer)).eval(), tokenizer, fresh)["say"] == 0.0
    assert report.exact_match["say"] >= 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "twin").eval()
    assert exact_match(model, tokenizer, fresh) == report.exact_match
