"""Metric sinks: what they receive and what they write."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft.errors import UsageError
from fedpeft.ledger.records import ClientOutcome, Evaluation, Round, Score
from fedpeft.reporting.sinks import SINKS, open_sink, scalars
from tests.reporting.rows import started, whole_run


def test_a_round_becomes_these_scalars() -> None:
    evaluation = Evaluation(
        scores={"loss": Score(value=0.5, low=0.4, high=0.6, count=9)},
        clients={"exact-match": {"a": 0.2, "b": 0.6}},
    )
    outcomes = (
        ClientOutcome(client="a", status="folded", bytes_up=5, bytes_down=7),
        ClientOutcome(client="b", status="late", bytes_up=6, bytes_down=7),
    )
    row = Round(round=4, outcomes=outcomes, train_loss=0.7, evaluation=evaluation, wall_s=2.0)
    found = {tag: (value, step) for tag, value, step in scalars(row, started(), 4)}
    assert found == {
        "test/loss": (0.5, 4),
        "spread/exact-match/worst": (0.2, 4),
        "spread/exact-match/p10": (pytest.approx(0.24), 4),
        "spread/exact-match/median": (pytest.approx(0.4), 4),
        "train/loss": (0.7, 4),
        "bytes/up": (11.0, 4),
        "bytes/down": (14.0, 4),
        "clients/asked": (2.0, 4),
        "clients/folded": (1.0, 4),
        "cost/round_wall_s": (2.0, 4),
    }


def test_what_is_not_finite_makes_no_point() -> None:
    row = Round(round=1, train_loss=math.nan, state_norm_change=math.inf)
    assert [tag for tag, _, _ in scalars(row, None, 1)] == ["cost/round_wall_s"]


def test_an_unknown_sink_is_refused(tmp_path: Path) -> None:
    assert set(SINKS) == {"tensorboard"}
    with pytest.raises(UsageError, match="'wandb'; use one of tensorboard"):
        open_sink("wandb", tmp_path)


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    rows = whole_run(rounds=3)
    sink = open_sink("tensorboard", tmp_path)
    for row in rows:
        sink.write(row)
    sink.close()
    sink.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    wanted = [
        row.evaluation.scores["exact-match"].value
        for row in rows
        if isinstance(row, Round) and row.evaluation
    ]
    points = events.Scalars("test/exact-match")
    assert [point.step for point in points] == [0, 1, 2, 3]
    assert [point.value for point in points] == pytest.approx(wanted, rel=1e-6)
    (pooled,) = events.Scalars("baseline/pooled/exact-match")
    assert (pooled.step, pooled.value) == (3, pytest.approx(0.951))


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; sys.modules['tensorboard'] = None\n"
        "from fedpeft.errors import MissingExtraError\n"
        "from fedpeft.reporting.sinks import open_sink\n"
        "try: open_sink('tensorboard', pathlib.Path(sys.argv[1]))\n"
        "except MissingExtraError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, check=True)
    assert "pip install 'fedpeft[tensorboard]'" in done.stdout
    assert done.stdout.count("\n") == 1
