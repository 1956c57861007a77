"""From records to texts: explode, filter, limit, and what a section may ask for."""

from __future__ import annotations

from typing import Any

import pytest

from fedpeft.config.sections import DataSection
from fedpeft.data.encoded import Task
from fedpeft.data.row_records import Layout, RowRecord, Selection, collect, select
from fedpeft.data.section_layout import make_layout, section_problems
from fedpeft.data.templates import compile_template
from fedpeft.errors import DataError


def records(*rows: dict[str, Any]) -> list[RowRecord]:
    return [RowRecord(0, "f.jsonl", number, row) for number, row in enumerate(rows, start=1)]


def chosen(selection: Selection, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    return [dict(record.fields) for record in select(records(*rows), selection)]


def test_explode_makes_a_row_of_each_item() -> None:
    rows = chosen(
        Selection(explode="s"), {"s": ["a", "b"], "who": 1}, {"s": [], "who": 2}, {"s": ["c"], "who": 3}
    )
    assert rows == [{"s": "a", "who": 1}, {"s": "b", "who": 1}, {"s": "c", "who": 3}]


def test_explode_needs_a_list() -> None:
    with pytest.raises(DataError, match=r"f\.jsonl: row 2: field 's', which data\.explode names, is 'x'"):
        chosen(Selection(explode="s"), {"s": ["a"]}, {"s": "x"})


def test_filter_comes_before_limit() -> None:
    rows = chosen(Selection(filter={"k": 1}, limit=2), *({"k": i % 2, "i": i} for i in range(10)))
    assert rows == [{"k": 1, "i": 1}, {"k": 1, "i": 3}]


def test_filter_matches_the_text_of_csv_values() -> None:
    assert chosen(Selection(filter={"k": -1}), {"k": "-1"}, {"k": "1"}, {"k": None}) == [{"k": "-1"}]


def test_filtering_by_a_field_that_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match=r"row 1: has no field 'split', .* it has a, b"):
        chosen(Selection(filter={"split": "x"}), {"a": 1, "b": 2})


def test_no_row_beyond_the_limit_is_looked_at() -> None:
    layout = Layout(compile_template("{t}", "data.text"))
    collected = collect(records({"t": "x"}, {"no": 1}), layout, Selection(limit=1), None)
    assert list(collected.prompts.build()) == ["x"]


def test_a_client_column_must_hold_plain_values() -> None:
    layout = Layout(compile_template("{t}", "data.text"), by="who")
    with pytest.raises(DataError, match=r"row 2: field 'who' is missing or null"):
        collect(records({"t": "x", "who": "a"}, {"t": "y", "who": None}), layout, Selection(), None)


LM: Task = "causal-lm"
CLASSIFIER: Task = "sequence-classification"


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        (LM, {"train": "f", "text": "{t}"}),
        (LM, {"train": "f", "prompt": "{p}", "answer": "{a}"}),
        (LM, {}),
        (CLASSIFIER, {"train": "f", "text": "{t}", "label": "y"}),
        (CLASSIFIER, {"text": "{prompt}", "label": "family"}),
    ],
)
def test_sections_without_problems(task: Any, keys: dict[str, Any]) -> None:
    assert section_problems(DataSection.model_validate(keys), task) == []


@pytest.mark.parametrize(
    ("task", "keys", "message"),
    [
        (LM, {"train": "f"}, "data has no template; a language model needs either data.text"),
        (LM, {"train": "f", "prompt": "{p}"}, "data has prompt; a language model needs"),
        (LM, {"train": "f", "text": "{t}", "answer": "{a}"}, "data has answer, text; a language model"),
        (LM, {"train": "f", "text": "{t}", "label": "y"}, "no data.label"),
        (CLASSIFIER, {"train": "f", "text": "{t}"}, "data has text; a classifier needs"),
        (CLASSIFIER, {}, "data has no template; a classifier needs"),
        (LM, {"partitioner": {"kind": "natural", "by": "family"}}, "embedded rows come with their clients"),
        (LM, {"train": "f", "text": "{t}", "test": "embedded"}, "data.test is 'embedded'"),
        (LM, {"train": "f", "text": "{t", "partitioner": {"clients": 2}}, "is no template"),
        (
            CLASSIFIER,
            {"train": "f", "text": "{t}", "label": "y", "labels": ["a", "a"]},
            "names a label twice",
        ),
        (
            LM,
            {"train": "f", "text": "{t}", "partitioner": {"clients": 2, "exclude": [1]}},
            "exclude needs a column",
        ),
    ],
)
def test_each_problem_is_one_line(task: Any, keys: dict[str, Any], message: str) -> None:
    (problem,) = section_problems(DataSection.model_validate(keys), task)
    assert message in problem
    assert "\n" not in problem


def test_all_problems_come_at_once() -> None:
    keys = {
        "train": "f",
        "prompt": "{p.q}",
        "test": "embedded",
        "partitioner": {"clients": 2, "exclude": [1]},
    }
    assert len(section_problems(DataSection.model_validate(keys), LM)) == 4


def test_embedded_rows_have_templates_of_their_own() -> None:
    layout = make_layout(DataSection(), LM)
    assert layout.answer is not None
    fields = {"prompt": "P{", "answer": "A"}
    assert (layout.prompt.render(fields, "").text, layout.answer.render(fields, "").text) == ("P{", "A")
