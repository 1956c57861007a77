"""A run goes on with the rows that it began with, wherever they lie now, and with no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedpeft.commands.arguments import adapter_and_run
from fedpeft.config.run_file import run_digest
from fedpeft.errors import StateError, UsageError
from fedpeft.ledger import RunFolder
from fedpeft.ledger.kept_rows import KEPT_ROWS
from fedpeft.reporting.progress import make_progress
from fedpeft.simulation.engine import simulate
from tests.simulation.runs import fingerprint, resumed, simulated

ROWS = [{"q": f"what is {i}", "a": f"it is {i}"} for i in range(24)]


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def own_rows(tables: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The tiny run on files of its own."""
    tables["data"] = {
        "train": str(write(tmp_path / "rows.jsonl", ROWS)),
        "test": str(write(tmp_path / "test.jsonl", ROWS[:4])),
        "prompt": "{q}",
        "answer": "{a}",
        "partitioner": {"kind": "iid", "clients": 2},
    }
    tables["run"]["rounds"] = 2
    return tables


def undo_last_round(out: Path) -> None:
    """Leave what a crash in the last round leaves."""
    (out / "report.html").unlink()
    (out / "checkpoints" / "round-000002.safetensors").unlink()


def resumed_with(out: Path, train: str, test: str) -> None:
    with RunFolder.resume(out, train=train, test=test) as folder, make_progress("quiet") as progress:
        simulate(folder, workers=1, engine="local", progress=progress)


@pytest.mark.parametrize("name", ["rows.jsonl", "test.jsonl"])
def test_changed_rows_are_refused_and_the_run_stays(
    own_rows: dict[str, Any], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "run"
    simulated(own_rows, out)
    whole = fingerprint(out)
    undo_last_round(out)
    kept = (tmp_path / name).read_text()
    (tmp_path / name).write_text(kept.replace("it is 1", "it is 7", 1))
    with pytest.raises(StateError, match=r"rows have changed.*--data"):
        resumed(out)
    (out / KEPT_ROWS).unlink()  # the checkpoint knows as well
    with pytest.raises(StateError, match="rows have changed"):
        resumed(out)
    (tmp_path / name).write_text(kept)
    resumed(out)
    assert fingerprint(out) == whole


def test_rows_that_moved_are_named_once(own_rows: dict[str, Any], tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    simulated(own_rows, out)
    whole = fingerprint(out)
    undo_last_round(out)
    elsewhere.mkdir()
    (tmp_path / "rows.jsonl").rename(elsewhere / "other-name.jsonl")
    (tmp_path / "test.jsonl").rename(elsewhere / "test.jsonl")
    wrong = write(elsewhere / "wrong.jsonl", ROWS[1:])
    places = {"train": str(elsewhere / "other-name.jsonl"), "test": str(elsewhere / "test.jsonl")}
    with pytest.raises(StateError, match="rows have changed"):
        resumed_with(out, str(wrong), places["test"])
    resumed_with(out, places["train"], places["test"])
    assert fingerprint(out) == whole
    undo_last_round(out)
    resumed(out)  # the folder remembers where they are
    assert fingerprint(out) == whole
    run = adapter_and_run(out, None, ())[1]
    assert (run.data.train, run.data.test) == (places["train"], places["test"])
    with RunFolder.resume(out) as folder:
        assert run_digest(folder.run) == folder.digest != run_digest(run)


def test_a_private_run_publishes_no_digest_of_its_rows(own_rows: dict[str, Any], tmp_path: Path) -> None:
    own_rows["privacy"] = {
        "kind": "client-level", "clip_norm": 1.0, "noise_multiplier": 1.0, "target_delta": 1e-3,
        "max_epsilon": 1e6, "seeded": True,
    }  # fmt: skip
    own_rows["federation"] = {"weighting": "uniform", "sampling": {"kind": "poisson", "rate": 0.5}}
    out = tmp_path / "run"
    simulated(own_rows, out)
    digest = json.loads((out / KEPT_ROWS).read_text())["digest"]
    named = [path.name for path in out.rglob("*") if path.is_file() and digest.encode() in path.read_bytes()]
    assert named == [KEPT_ROWS]
    undo_last_round(out)
    write(tmp_path / "rows.jsonl", ROWS[1:])
    with pytest.raises(StateError, match="rows have changed"):
        resumed(out)


def test_an_engine_that_reads_rows_again_takes_them_where_the_run_says(
    own_rows: dict[str, Any], tmp_path: Path
) -> None:
    simulated(own_rows, tmp_path / "run")
    undo_last_round(tmp_path / "run")
    with (
        RunFolder.resume(tmp_path / "run", train="elsewhere.jsonl") as folder,
        make_progress("quiet") as progress,
        pytest.raises(UsageError, match="ray reads rows"),
    ):
        simulate(folder, workers=1, engine="ray", progress=progress)
