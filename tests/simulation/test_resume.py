"""kill -9 at any instant, resume, and the result is the one of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedpeft.config.run_file import build_run
from fedpeft.errors import RunExistsError, StateError
from fedpeft.ledger import RunFolder
from fedpeft.ledger.run_place import write_run
from tests.simulation.runs import fingerprint, resumed, simulated

ROOT = Path(__file__).parents[2]


def _start(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fedpeft.cli", "simulate", "--quiet", "--workers", "2", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _kill_when(process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    """SIGKILL as soon as `condition` holds; a process that ends before is fine."""
    deadline = time.monotonic() + 120
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline, "the run neither ended nor reached the point"
        time.sleep(0.002)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()


FEW = ("checkpoint 0", "checkpoint 2", "adapter")
MANY = ("rows", "checkpoint 0", "checkpoint 1", "checkpoint 2", "baseline", "adapter")


@pytest.mark.slow
@pytest.mark.parametrize(
    "points", [FEW, pytest.param(MANY, marks=pytest.mark.exhaustive)], ids=["few", "many"]
)
def test_kill_at_many_points_and_resume_gives_the_same_bytes(
    points: Sequence[str], tables: dict[str, Any], tmp_path: Path
) -> None:
    tables["evaluation"]["baselines"] = True
    simulated(tables, tmp_path / "undisturbed", workers=2)
    run_file, out = tmp_path / "run.toml", tmp_path / "killed"
    run_file.write_text(tomli_w.dumps(tables))
    rows = out / "metrics.jsonl"

    def reached(point: str) -> bool:
        kind, _, number = point.partition(" ")
        if kind == "checkpoint":
            return (out / "checkpoints" / f"round-{int(number):06d}.safetensors").exists()
        if kind == "baseline":
            return rows.exists() and '"baseline"' in rows.read_text()
        return (rows if kind == "rows" else out / kind).exists()

    jitter = random.Random(0)
    for number, point in enumerate(points):
        process = _start(str(run_file), "--out", str(out)) if number == 0 else _start("--resume", str(out))
        _kill_when(process, lambda point=point: reached(point))  # type: ignore[misc]
        time.sleep(jitter.random() * 0.2)
    resumed(out, workers=2)
    assert fingerprint(out) == fingerprint(tmp_path / "undisturbed")
    leftovers = [path for path in out.rglob("*") if "partial" in path.name]
    assert leftovers == []


def test_resume_after_a_torn_row_and_an_uncommitted_row(tables: dict[str, Any], tmp_path: Path) -> None:
    simulated(tables, tmp_path / "whole")
    simulated(tables, tmp_path / "torn")
    out = tmp_path / "torn"
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "checkpoints" / "round-000003.safetensors").unlink()  # its row was written, its checkpoint is gone
    (out / "metrics.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])
    resumed(out)
    assert fingerprint(out) == fingerprint(tmp_path / "whole")


def test_a_finished_run_is_not_replaced_without_force(tables: dict[str, Any], tmp_path: Path) -> None:
    tables["run"]["rounds"] = 1
    simulated(tables, tmp_path / "run")
    before = fingerprint(tmp_path / "run")
    with pytest.raises(RunExistsError, match="--force"):
        simulated(tables, tmp_path / "run")
    resumed(tmp_path / "run")  # nothing to do
    assert fingerprint(tmp_path / "run") == before


def test_a_corrupt_checkpoint_is_refused_and_the_one_before_serves(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    simulated(tables, tmp_path / "whole")
    simulated(tables, tmp_path / "broken")
    last = tmp_path / "broken" / "checkpoints" / "round-000003.safetensors"
    content = bytearray(last.read_bytes())
    content[-1] ^= 1
    last.write_bytes(bytes(content))
    (tmp_path / "broken" / "report.html").unlink()
    with pytest.raises(StateError, match="corrupt; delete it"):
        resumed(tmp_path / "broken")
    last.unlink()
    resumed(tmp_path / "broken")
    assert fingerprint(tmp_path / "broken") == fingerprint(tmp_path / "whole")


def test_a_checkpoint_of_another_run_is_refused(tables: dict[str, Any], tmp_path: Path) -> None:
    tables["run"]["rounds"] = 1
    simulated(tables, tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    tables["training"]["lr"] = 1e-3
    write_run(tmp_path / "run", build_run(tables, source="test"))
    with pytest.raises(StateError, match="of run"):
        resumed(tmp_path / "run")


def test_two_processes_cannot_hold_one_folder(tables: dict[str, Any], tmp_path: Path) -> None:
    run = build_run(tables, source="test")
    with RunFolder.create(tmp_path / "run", run), pytest.raises(StateError, match="in use"):
        RunFolder.resume(tmp_path / "run")
