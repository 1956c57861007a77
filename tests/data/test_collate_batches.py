"""Padding and batching against loops over rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.data.collate import (
    IGNORED,
    collate,
    evaluation_batches,
    prompt_batch,
    steps_per_pass,
    training_batches,
)
from fedpeft.data.encoded import Encoded, offsets_of
from fedpeft.errors import DataError

PAD = 9999
ROW = st.lists(st.integers(0, 99), min_size=1, max_size=7)


def build(rows: list[list[int]], starts: list[int], labels: list[int] | None = None) -> Encoded:
    ids = np.array([token for row in rows for token in row], dtype=np.int32)
    classes = None if labels is None else np.array(labels, dtype=np.int64)
    return Encoded(ids, offsets_of([len(row) for row in rows]), np.array(starts, dtype=np.int32), classes)


def index(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, dtype=np.int64)


@given(st.lists(ROW, min_size=1, max_size=6), st.data())
def test_collate_is_the_loop_over_rows(rows: list[list[int]], data: st.DataObject) -> None:
    starts = [data.draw(st.integers(0, len(row))) for row in rows]
    picks = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    batch = collate(build(rows, starts), index(*picks), PAD, task="causal-lm")
    width = max(len(rows[i]) for i in picks)
    for place, i in enumerate(picks):
        padding = width - len(rows[i])
        labels = [IGNORED if at < max(starts[i], 1) else token for at, token in enumerate(rows[i])]
        assert batch.input_ids[place].tolist() == rows[i] + [PAD] * padding
        assert batch.attention_mask[place].tolist() == [1] * len(rows[i]) + [0] * padding
        assert batch.labels[place].tolist() == labels + [IGNORED] * padding
    assert batch.examples == len(picks)
    assert batch.tokens == int((batch.labels[:, 1:] != IGNORED).sum())
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.labels.dtype} == {torch.int64}


def test_a_token_equal_to_the_padding_id_is_still_a_token() -> None:
    batch = collate(build([[PAD, PAD], [1]], [0, 0]), index(0, 1), PAD, task="causal-lm")
    assert batch.attention_mask.tolist() == [[1, 1], [1, 0]]
    assert batch.labels.tolist() == [[IGNORED, PAD], [IGNORED, IGNORED]]


def test_classifier_batches_carry_class_ids() -> None:
    batch = collate(
        build([[1, 2], [3], [4]], [0, 0, 0], [5, 6, 7]), index(2, 0), PAD, task="sequence-classification"
    )
    assert batch.labels.tolist() == [7, 5]
    assert (batch.examples, batch.tokens) == (2, 2)


def test_classifier_rows_without_class_ids_are_refused() -> None:
    with pytest.raises(DataError, match="no class ids"):
        collate(build([[1]], [0]), index(0), PAD, task="sequence-classification")


@given(st.lists(ROW, min_size=1, max_size=6), st.data())
def test_prompts_are_padded_on_the_left(rows: list[list[int]], data: st.DataObject) -> None:
    starts = [data.draw(st.integers(1, len(row))) for row in rows]
    batch = prompt_batch(build(rows, starts), index(*range(len(rows))), PAD)
    width = max(starts)
    for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
        assert batch.input_ids[place].tolist() == [PAD] * (width - start) + row[:start]
        assert batch.attention_mask[place].tolist() == [0] * (width - start) + [1] * start


def test_plain_text_has_no_prompt_to_generate_from() -> None:
    with pytest.raises(DataError, match=r"data\.prompt"):
        prompt_batch(build([[1, 2]], [0]), index(0), PAD)


@pytest.mark.parametrize(
    "call", [lambda e: collate(e, index(), PAD, task="causal-lm"), lambda e: prompt_batch(e, index(), PAD)]
)
def test_no_rows_are_refused(call: object) -> None:
    with pytest.raises(DataError, match="no rows"):
        call(build([[1]], [0]))  # type: ignore[operator]  # a lambda in a table


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 20), st.integers(0, 2**32))
def test_each_pass_sees_each_row_once(rows: int, batch_size: int, steps: int, seed: int) -> None:
    encoded = build([[1]] * (rows + 3), [0] * (rows + 3))
    indices = np.arange(3, rows + 3)
    batches = list(training_batches(encoded, indices, batch_size, steps, np.random.default_rng(seed)))
    again = list(training_batches(encoded, indices, batch_size, steps, np.random.default_rng(seed)))
    assert [b.tolist() for b in batches] == [b.tolist() for b in again]
    assert len(batches) == steps
    per_pass = -(-rows // batch_size)
    assert steps_per_pass(rows, batch_size) == per_pass
    for first in range(0, steps - per_pass + 1, per_pass):
        seen = np.concatenate(batches[first : first + per_pass])
        assert sorted(seen.tolist()) == indices.tolist()
    sizes = [batch_size] * (rows // batch_size) + ([rows % batch_size] if rows % batch_size else [])
    assert [len(b) for b in batches] == [sizes[step % per_pass] for step in range(steps)]


def test_passes_are_shuffled_anew() -> None:
    encoded = build([[1]] * 50, [0] * 50)
    first, second = training_batches(encoded, np.arange(50), 50, 2, np.random.default_rng(0))
    assert first.tolist() != second.tolist()


def test_training_without_rows_is_refused_at_once() -> None:
    with pytest.raises(DataError, match="no rows"):
        training_batches(build([[1]], [0]), index(), 4, 1, np.random.default_rng(0))


@given(st.lists(ROW, min_size=1, max_size=12), st.integers(1, 5))
def test_evaluation_batches_hold_each_row_once_longest_first(rows: list[list[int]], batch_size: int) -> None:
    batches = evaluation_batches(build(rows, [0] * len(rows)), np.arange(len(rows)), batch_size)
    order = [int(i) for batch in batches for i in batch]
    # Python's sort is stable as ours must be, or equal rows would change batches between machines.
    assert order == sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    assert all(len(batch) == batch_size for batch in batches[:-1])
