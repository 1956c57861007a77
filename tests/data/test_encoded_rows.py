"""Flat arrays against lists of lists."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.data.encoded import Encoded, Texts, flat_positions, offsets_of

ROWS = st.lists(st.lists(st.integers(0, 999), max_size=6), max_size=8)


def flat(rows: list[list[int]], starts: list[int] | None = None) -> Encoded:
    ids = np.array([token for row in rows for token in row], dtype=np.int32)
    at = starts if starts is not None else [0] * len(rows)
    return Encoded(
        ids,
        offsets_of([len(row) for row in rows]),
        np.array(at, dtype=np.int32),
        labels=np.arange(len(rows), dtype=np.int64),
        answers=Texts.pack(str(row) for row in rows),
    )


@given(ROWS, st.data())
def test_take_is_list_indexing(rows: list[list[int]], data: st.DataObject) -> None:
    picks = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6)) if rows else []
    taken = flat(rows).take(np.array(picks, dtype=np.int64))
    assert [taken.row(i).tolist() for i in range(len(taken))] == [rows[i] for i in picks]
    assert taken.labels is not None
    assert taken.labels.tolist() == picks
    assert taken.answers is not None
    assert list(taken.answers) == [str(rows[i]) for i in picks]


@given(ROWS)
def test_positions_walk_the_rows_in_the_given_order(rows: list[list[int]]) -> None:
    encoded = flat(rows)
    order = np.arange(len(rows), dtype=np.int64)[::-1]
    walked = encoded.input_ids[flat_positions(encoded.offsets, order)].tolist()
    assert walked == [token for row in rows[::-1] for token in row]


@given(ROWS)
def test_loss_tokens_leave_out_prompt_and_first_token(rows: list[list[int]]) -> None:
    starts = [len(row) // 2 for row in rows]
    counted = [len(row[max(start, 1) :]) for row, start in zip(rows, starts, strict=True)]
    assert flat(rows, starts).loss_tokens.tolist() == counted
    assert flat(rows, starts).lengths.tolist() == [len(row) for row in rows]


@given(st.lists(st.text(), max_size=8))
def test_texts_come_back(strings: list[str]) -> None:
    packed = Texts.pack(strings)
    assert list(packed) == [string.encode("utf-8", "replace").decode() for string in strings]
    assert len(packed) == len(strings)


def test_a_lone_surrogate_does_not_stop_a_run() -> None:
    assert list(Texts.pack(["a\ud800b"])) == ["a?b"]


def test_prompt_is_what_comes_before_the_answer() -> None:
    encoded = flat([[5, 6, 7], [8]], [2, 0])
    assert encoded.prompt(0).tolist() == [5, 6]
    assert encoded.prompt(1).tolist() == []
