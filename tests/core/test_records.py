"""Rows of `metrics.jsonl`: written, read, and refused."""

from __future__ import annotations

import json
import math

import pytest
from pydantic import ValidationError

from fedpeft.ledger.records import (
    Baseline,
    ClientOutcome,
    Evaluation,
    Finished,
    Round,
    Score,
    Started,
    parse_row,
)

EVALUATION = Evaluation(
    scores={"accuracy": Score(value=0.5, low=0.25, high=0.75, count=8)}, clients={"accuracy": {"a": 0.1}}
)
ROWS = (
    Started(
        run_name="x", run_digest="d", seed=2**63 - 1, rounds=2, engine="local", clients={"a": 3, "b": 1},
        test_examples=8, trainable_parameters=5, total_parameters=9, base_digest="e", cut_rows=0,
        primary_metric="accuracy", higher_is_better={"accuracy": True}, versions={"torch": "2"},
    ),
    Round(round=0, evaluation=EVALUATION),
    Round(
        round=1, train_loss=0.1 + 0.2, state_norm_change=1e-300, notes=("zwölf\nlines",), wall_s=1.5,
        outcomes=(
            ClientOutcome(client="a", status="folded", examples=3, loss=1.0, update_norm=0.3, virtual_s=2.0),
            ClientOutcome(client="b", status="refused", reason="NaN"),
        ),
    ),
    Baseline(name="local", evaluations={"a": EVALUATION}),
    Finished(rounds=1, adapter_digest="f", bytes_up_per_client=1.5, bytes_down_per_client=2.0),
)  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.event}-{getattr(row, 'round', '')}")
def test_a_row_is_one_line_and_comes_back(row: Round) -> None:
    line = row.model_dump_json()
    assert "\n" not in line
    assert json.loads(line)["event"] == row.event
    assert parse_row(line) == row
    assert parse_row(line.encode()) == row


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_score_that_is_not_finite_comes_back(value: float) -> None:
    """A diverged model has an infinite perplexity; its run must stay readable."""
    row = Round(round=1, evaluation=Evaluation(scores={"p": Score(value=value, low=0, high=value, count=1)}))
    line = row.model_dump_json()
    json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = parse_row(line)
    assert isinstance(back, Round)
    assert back.evaluation is not None
    assert repr(back.evaluation.scores["p"].value) == repr(value)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"event":"unheard"}',
        '{"event":"round"}',
        '{"event":"round","round":1,"extra":2}',
        '{"event":"round","round":"one"}',
        b"\xff\xfe",
    ],
)
def test_what_is_no_row_is_refused(line: str | bytes) -> None:
    with pytest.raises(ValidationError):
        parse_row(line)


def test_rows_are_frozen() -> None:
    with pytest.raises(ValidationError):
        ROWS[1].round = 3  # type: ignore[misc]


def test_only_wall_times_may_differ_between_runs() -> None:
    """The promise by which two runs of one seed are compared: times are all named ``wall_s``."""
    timed = {
        key
        for row in (Started, Round, Baseline, Finished, ClientOutcome)
        for key in row.model_fields
        if key.endswith("_s")
    }
    assert timed == {"wall_s", "virtual_s"}
