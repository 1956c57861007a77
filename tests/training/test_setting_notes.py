"""Settings that are allowed and hardly meant."""

from __future__ import annotations

from typing import Any

import pytest

from fedpeft.config.run_file import build_run
from fedpeft.training.setting_notes import setting_notes


def notes(**tables: Any) -> tuple[str, ...]:
    return setting_notes(build_run({"run": {"name": "odd", "rounds": 1}, **tables}, source="test"))


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"training": {"lr": 5.0}}, "training.lr = 5 is far above"),
        ({"training": {"lr": 1e6, "optimizer": "sgd"}}, "training.lr = 1e+06 is far above"),
        ({"training": {"lr": 1e-12}}, "moves no weight"),
        ({"evaluation": {"max_new_tokens": 10**6}}, "evaluation.max_new_tokens = 1,000,000"),
        ({"data": {"max_length": 3}}, "data.max_length = 3"),
    ],
)
def test_one_line_says_so(tables: dict[str, Any], words: str) -> None:
    (note,) = notes(**tables)
    assert words in note


def test_nothing_is_said_of_usual_settings() -> None:
    assert notes() == notes(training={"lr": 0.5, "optimizer": "sgd"}) == ()
    assert notes(training={"kind": "none", "lr": 5.0}) == ()
