"""Rows that would be trained or scored and mean nothing: said or refused before training."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from fedpeft.config.sections import DataSection
from fedpeft.data.readers import WrittenNumber
from fedpeft.data.run_tables import read_tables
from fedpeft.data.section_layout import section_problems
from fedpeft.errors import DataError


def written(path: Path, *rows: tuple[str, str]) -> str:
    path.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in rows))
    return str(path)


def section(train: str, **keys: object) -> DataSection:
    form = {"prompt": "{q}", "answer": "{a}", "partitioner": {"kind": "iid", "clients": 1}}
    return DataSection.model_validate({"train": train, **form, **keys})


ROWS = [(f"q{number}", f"a{number}") for number in range(8)]


@pytest.mark.parametrize(
    ("test", "words"),
    [
        (ROWS, "all 8 rows are training rows too"),
        ([*ROWS[:2], ("new", "x")], "2 of 3 rows"),
        ([("n", "x")], ""),
    ],
)
def test_test_rows_that_are_training_rows_are_said(
    test: list[tuple[str, str]], words: str, tmp_path: Path
) -> None:
    train = written(tmp_path / "train.jsonl", *ROWS)
    raw = read_tables(section(train, test=written(tmp_path / "test.jsonl", *test)), "causal-lm", 0)
    assert any(words in note for note in raw.notes) == bool(words)
    assert len([note for note in raw.notes if note.startswith("data.test")]) == bool(words)


def test_of_hidden_rows_nothing_is_said(tmp_path: Path) -> None:
    train = written(tmp_path / "train.jsonl", *ROWS)
    assert read_tables(section(train, test=train), "causal-lm", 0, hides_rows=True).notes == ()


def test_answers_that_are_all_empty_are_refused(tmp_path: Path) -> None:
    rows = [(q, "") for q, _ in ROWS]
    with pytest.raises(DataError, match="all 8 answers are empty"):
        read_tables(section(written(tmp_path / "empty.jsonl", *rows)), "causal-lm", 0)
    (tmp_path / "empty.jsonl").unlink()
    some = written(tmp_path / "some.jsonl", *rows[1:], ROWS[0])
    assert len(read_tables(section(some), "causal-lm", 0).rows) == 8


@pytest.mark.parametrize(("keys", "key"), [({"answer": "yes"}, "answer"), ({"text": "hello"}, "text")])
def test_a_template_without_a_field_is_refused(keys: dict[str, str], key: str) -> None:
    form = {"prompt": "{q}"} if key == "answer" else {"prompt": None, "answer": None}
    (problem,) = section_problems(section("rows.jsonl", **{**form, **keys}), "causal-lm")
    assert problem.startswith(f"data.{key} = ")
    assert "names no field" in problem


def test_a_prompt_may_be_the_same_for_all_rows() -> None:
    assert section_problems(section("rows.jsonl", prompt="Write a line:"), "causal-lm") == []


def test_numbers_read_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "prices.jsonl"
    path.write_text('{"q": "price", "a": 1.50}\n{"q": "large", "a": 1e3}\n{"q": "int", "a": 7}\n')
    answers = read_tables(section(str(path)), "causal-lm", 0).rows.answers
    assert answers is not None
    assert sorted(answers) == ["1.50", "1e3", "7"]
    number = WrittenNumber("1.50")
    assert number == 1.5
    assert str(pickle.loads(pickle.dumps(number))) == "1.50"
