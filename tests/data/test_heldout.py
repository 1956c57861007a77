"""Held-out rows: one row more or less moves nothing but itself, wherever it stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom  # type: ignore[import-untyped]  # scipy ships no types

from fedpeft.config.sections import DataSection
from fedpeft.data.federated import FederatedData
from fedpeft.data.heldout import content_draws, split_heldout
from fedpeft.errors import DataError
from tests.data.loading import load_client, load_federated

FALSE_ALARM = 1e-6
TEXTS = st.lists(st.text("ab", min_size=1, max_size=2), max_size=30)


def sides(texts: list[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    draws = content_draws(((text,) for text in texts), seed)
    train, held = split_heldout(np.arange(len(texts)), draws, share)
    return [texts[int(i)] for i in train], [texts[int(i)] for i in held]


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.text("ab", min_size=1, max_size=2), st.integers(0, 30), st.sampled_from([0.0, 0.1, 0.5]))
def test_one_more_row_moves_only_itself(texts: list[str], more: str, place: int, share: float) -> None:
    """Also a copy of a row that is there, which follows it."""
    train, held = sides(texts, share, 3)
    more_train, more_held = sides([*texts[:place], more, *texts[place:]], share, 3)
    assert sorted([*train, *held]) == sorted(texts)
    grown = [side for side, before in ((more_train, train), (more_held, held)) if len(side) != len(before)]
    assert len(grown) == 1
    grown[0].remove(more)
    assert (sorted(more_train), sorted(more_held)) == (sorted(train), sorted(held))


def test_the_share_is_met_on_average_and_the_seed_decides() -> None:
    texts = [f"row {i}" for i in range(4000)]
    held = [set(sides(texts, 0.1, seed)[1]) for seed in (0, 1)]
    low, high = binom.ppf([FALSE_ALARM, 1 - FALSE_ALARM], len(texts), 0.1)
    assert all(low <= len(side) <= high for side in held)
    low, high = binom.ppf([FALSE_ALARM, 1 - FALSE_ALARM], len(texts), 0.01)
    assert low <= len(held[0] & held[1]) <= high


def test_contents_do_not_run_into_each_other() -> None:
    first, second, third = content_draws([("ab", "c"), ("a", "bc"), ("ab", "c")], 0)
    assert first == third != second


def section(path: Path, **keys: Any) -> DataSection:
    given = {"train": str(path), "prompt": "{q}", "answer": "{a}", "partitioner": {"kind": "files"}}
    return DataSection.model_validate(given | {"heldout": 0.3} | keys)


def rows_of(data: FederatedData, indices: Any) -> list[bytes]:
    return sorted(data.rows.row(int(i)).tobytes() for i in indices)


ROWS = [{"q": f"q{i % 20}", "a": f"a{i % 20}", "who": f"w{i % 7}"} for i in range(40)]


@pytest.mark.parametrize("left_out", range(0, 40, 9))
def test_a_client_reads_its_other_rows_as_before(write_rows: Any, tokenizer: Any, left_out: int) -> None:
    """Of the neighbours that record-level privacy speaks of, as an agent reads them."""
    fewer = [row for number, row in enumerate(ROWS) if number != left_out]
    sides = []
    for rows in (ROWS, fewer):
        path = write_rows("client.jsonl", rows)
        options: Any = {"task": "causal-lm", "tokenizer": tokenizer, "seed": 3, "hides_rows": True}
        data = load_client(section(path), path, name="c", **options)
        sides.append([rows_of(data, part) for part in (data.clients[0].train, data.clients[0].heldout)])
    lost = [len(whole) - len(part) for whole, part in zip(*sides, strict=True)]
    assert sorted(lost) == [0, 1]
    for whole, part in zip(*sides, strict=True):
        assert all(whole.count(row) >= part.count(row) for row in part)


def test_all_rows_of_a_person_are_on_one_side(write_rows: Any, tokenizer: Any) -> None:
    path = write_rows("client.jsonl", ROWS)
    options: Any = {"task": "causal-lm", "tokenizer": tokenizer, "hides_rows": True, "name": "c"}
    both = set()
    for seed in range(6):
        data = load_client(section(path, user="who"), path, seed=seed, **options)
        assert data.rows.users is not None
        train, held = (
            set(data.rows.users[part]) for part in (data.clients[0].train, data.clients[0].heldout)
        )
        assert not train & held
        both |= {("train", bool(train)), ("held", bool(held))}
    assert {("train", True), ("held", True)} <= both


def test_equal_rows_of_two_clients_are_on_one_side(write_rows: Any, tokenizer: Any, tmp_path: Path) -> None:
    """So that no client trains on what another scores."""
    for name in ("a", "b"):
        write_rows(f"{name}.jsonl", ROWS)
    data = load_federated(section(tmp_path / "*.jsonl"), task="causal-lm", tokenizer=tokenizer, seed=0)
    first, second = data.clients
    assert rows_of(data, first.heldout) == rows_of(data, second.heldout)
    assert not set(rows_of(data, first.heldout)) & set(rows_of(data, second.train))


def test_rows_that_would_all_be_held_out_train_unless_rows_are_hidden(
    write_rows: Any, tokenizer: Any
) -> None:
    """Which side one row is on tells whether it is there, hence only where that is nobody's secret."""
    path = write_rows("client.jsonl", ROWS[:1])
    options: Any = {"task": "causal-lm", "tokenizer": tokenizer, "seed": 0, "name": "c"}
    keys = section(path, heldout=0.999)
    open_, hidden = (load_client(keys, path, hides_rows=hides, **options) for hides in (False, True))
    assert (len(open_.clients[0].train), len(open_.clients[0].heldout)) == (1, 0)
    assert (len(hidden.clients[0].train), len(hidden.clients[0].heldout)) == (0, 1)


@pytest.mark.parametrize("rows", [[], [{"q": "", "a": "", "who": "w"}]], ids=["no row", "an empty row"])
def test_a_client_without_rows_is_a_client_where_rows_are_hidden(
    write_rows: Any, tokenizer: Any, rows: list[dict[str, str]]
) -> None:
    path = write_rows("client.jsonl", rows)
    options: Any = {"task": "causal-lm", "tokenizer": tokenizer, "seed": 0, "name": "c"}
    keys = section(path, heldout=0.0)
    data = load_client(keys, path, hides_rows=True, **options)
    assert len(data.clients[0].train) <= len(rows)
    if not rows:
        with pytest.raises(DataError, match="client c has no rows"):
            load_client(keys, path, **options)


def test_a_limit_is_refused_where_rows_are_hidden(write_rows: Any, tokenizer: Any) -> None:
    """The first rows, or those of the smallest draws: either way one row puts another out."""
    path = write_rows("client.jsonl", ROWS)
    options: Any = {"task": "causal-lm", "tokenizer": tokenizer, "seed": 0, "name": "c"}
    assert len(load_client(section(path, limit=5, heldout=0.0), path, **options).rows) == 5
    with pytest.raises(DataError, match=r"data\.limit.*remove it") as caught:
        load_client(section(path, limit=5), path, hides_rows=True, **options)
    assert "\n" not in str(caught.value)


BAD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "without a field": ({"a": "x", "who": "w"}, {}),
    "without the filter's field": ({"q": "x", "a": "y"}, {"filter": {"who": "w3"}}),
    "without a person": ({"q": "x", "a": "y"}, {"user": "who"}),
    "not a list": ({"q": "x", "a": 3, "who": "w"}, {"explode": "a", "user": "who"}),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_a_row_that_cannot_be_used_is_left_out_alone_where_rows_are_hidden(
    write_rows: Any, tokenizer: Any, case: str
) -> None:
    """A refusal would tell about it; and where rows are no secret it is one."""
    bad, keys = BAD[case]
    good: list[Any] = [{**row, "a": [row["a"]]} for row in ROWS] if "explode" in keys else list(ROWS)
    options: Any = {"task": "causal-lm", "tokenizer": tokenizer, "seed": 0, "name": "c"}
    read = []
    for rows in (good, [*good[:7], bad, *good[7:]]):
        path = write_rows("client.jsonl", rows)
        data = load_client(section(path, **keys), path, hides_rows=True, **options)
        read.append((rows_of(data, data.clients[0].train), rows_of(data, data.clients[0].heldout)))
    assert read[0] == read[1]
    assert data.dropped_rows == 1
    with pytest.raises(DataError):
        load_client(section(path, **keys), path, **options)


LINES: dict[str, bytes] = {
    "no JSON": b'{"q": "x", ',
    "text": b"a note that somebody left",
    "an array": b'[{"q": "x", "a": "y", "who": "w"}]',
    "the beginning of an array": b"[",
    "a number": b"7",
    "a field twice": b'{"q": "x", "q": "z", "a": "y", "who": "w"}',
    "another encoding": b'{"q": "\xe9t\xe9", "a": "y", "who": "w"}',
    "depth": b"[" * 100_000,
}


@pytest.mark.parametrize("place", [0, 7, len(ROWS)])
@pytest.mark.parametrize("line", sorted(LINES))
def test_a_line_that_is_no_row_is_left_out_alone_where_rows_are_hidden(
    tmp_path: Path, tokenizer: Any, line: str, place: int
) -> None:
    """Wherever it stands, and whatever it would make of the file: the others are read as without it."""
    good = [json.dumps(row).encode() for row in ROWS]
    options: Any = {"task": "causal-lm", "tokenizer": tokenizer, "seed": 0, "name": "c"}
    read, dropped = [], []
    for lines in (good, [*good[:place], LINES[line], *good[place:]]):
        path = tmp_path / "client.jsonl"
        path.write_bytes(b"".join(each + b"\n" for each in lines))
        data = load_client(section(path), path, hides_rows=True, **options)
        read.append((rows_of(data, data.clients[0].train), rows_of(data, data.clients[0].heldout)))
        dropped.append(data.dropped_rows)
    assert read[0] == read[1]
    assert dropped == [0, 1]


def test_a_class_outside_the_map_is_left_out_alone(write_rows: Any, tokenizer: Any) -> None:
    rows = [{"q": f"row {n}", "y": "abz"[n % 3]} for n in range(9)]
    path = write_rows("client.jsonl", rows)
    keys: dict[str, Any] = {"prompt": None, "answer": None, "text": "{q}", "label": "y", "labels": ["a", "b"]}
    options: Any = {"task": "sequence-classification", "tokenizer": tokenizer, "seed": 0, "name": "c"}
    data = load_client(section(path, **keys), path, hides_rows=True, **options)
    assert (len(data.rows), data.dropped_rows) == (6, 3)
    assert data.rows.labels is not None
    assert data.rows.labels.tolist() == [0, 1] * 3


LABELS: list[Any] = [
    ["a", "b", "c"],
    ["c", "a", "b"],
    {"b": 0, "a": 1, "c": 2},
    {"c": 1, "b": 2, "a": 0},
]


@pytest.mark.parametrize("labels", LABELS[1:])
def test_the_order_of_classes_moves_no_row_across_the_split(
    write_rows: Any, tokenizer: Any, labels: Any
) -> None:
    """A row's side is its own: what number a run file gives to its class has no part in it."""
    rows = [{"q": f"row {n}", "y": "abc"[n % 3]} for n in range(60)]
    path = write_rows("client.jsonl", rows)
    keys: dict[str, Any] = {"prompt": None, "answer": None, "text": "{q}", "label": "y", "heldout": 0.5}
    options: Any = {"task": "sequence-classification", "tokenizer": tokenizer, "seed": 0, "name": "c"}
    first, second = (
        load_client(section(path, labels=each, **keys), path, **options).clients[0]
        for each in (LABELS[0], labels)
    )
    assert first.heldout.tolist() == second.heldout.tolist()
    assert 10 < len(first.heldout) < 50


def test_a_simulation_says_what_is_wrong_with_all_rows(write_rows: Any, tokenizer: Any) -> None:
    """Whoever runs it reads its rows anyway, and a run without any would be a mistake."""
    path = write_rows("client.jsonl", ROWS)
    options: Any = {"task": "causal-lm", "tokenizer": tokenizer, "seed": 0, "hides_rows": True}
    with pytest.raises(DataError, match="field 'nothing'"):
        load_federated(section(path, prompt="{nothing}"), **options)
