"""kill -9 of the daemon at every instrumented point, restart, and nothing is lost, doubled or different."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.server.test_supervisor import tables

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("fedpeft", "server", "client")
# Points of the transport and of the process around it: tests of those kill whole daemons and agents.
ELSEWHERE = ("server.results.", "server.daemon.", "agent.")


def points() -> list[str]:
    """Names given to `crash_point` anywhere in the sources."""
    found = []
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "crash_point":
                    (name,) = node.args
                    assert isinstance(name, ast.Constant), f"{path}: a literal is needed"
                    assert isinstance(name.value, str)
                    found.append(name.value)
    return found


POINTS = points()
HERE = [name for name in POINTS if not name.startswith(ELSEWHERE)]
PRIVATE = [name for name in HERE if name.startswith("server.budget.")]
PLAIN = [name for name in HERE if name not in PRIVATE]
# Points that a run passes often are tried in its middle as well.
LATER = {"server.accept.committed": 6, "server.blob.renamed": 6, "server.commit.committed": 3}

# The same points in the order in which the lives of one run can come to them.
LIFE = (
    "server.submit.inserted",
    "server.submit.committed",
    "server.run.begun",
    "server.roster.written",
    "server.roster.committed",
    "server.status.written",
    "server.status.committed",
    "server.checkpoint.begun",
    "server.blob.begun",
    "server.blob.written",
    "server.blob.flushed",
    "server.blob.renamed",
    "server.blob.durable",
    "server.checkpoint.written",
    "server.commit.written",
    "server.commit.counted",
    "server.commit.committed",
    "server.round.drawn",
    "server.round.written",
    "server.round.opened",
    "server.upload.piece",
    "server.upload.whole",
    "server.accept.begun",
    "server.accept.inserted",
    "server.accept.committed",
    "server.blob.removed",
    "server.commit.cleaned",
    "server.run.exported",
    "server.run.checkpoint-copied",
    "server.finish.written",
    "server.finish.committed",
)


def test_there_are_enough_points_and_each_is_there_once() -> None:
    assert len(POINTS) >= 40
    assert len(POINTS) == len(set(POINTS))
    assert all(name.startswith(("server.", "agent.")) for name in POINTS)
    assert sorted(LIFE) == sorted(PLAIN)


@dataclass
class Zygote:
    """See `tests.server.zygote`."""

    process: subprocess.Popen[str]

    def hold(self, state: Path, run: dict[str, Any], crash_at: str = "") -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {"state": str(state), "run": run, "crash_at": crash_at}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.server.zygote"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(str(ROOT / f) for f in (".", "server", "client"))},
    )
    yield Zygote(process)
    process.communicate(timeout=60)


@dataclass(frozen=True)
class Outcome:
    """What must not depend on kills."""

    adapter: str
    rows: str
    updates: tuple[tuple[int, str, str, int], ...]  # round, agent, digest, counted


def outcome(state: Path) -> Outcome:
    folder = state / "runs" / "tiny-1"
    adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for measured in ("wall_s", "peak_rss_mib"):
            row.pop(measured, None)
    updates = asked(state, "SELECT round, agent, digest, counted FROM updates ORDER BY round, agent")
    return Outcome(hashlib.sha256(adapter).hexdigest(), json.dumps(rows, sort_keys=True), tuple(updates))


def asked(state: Path, query: str) -> list[Any]:
    connection = sqlite3.connect(state / "state.db")
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    state = tmp_path_factory.mktemp("undisturbed") / "state"
    assert zygote.hold(state, plain()) == 0
    found = outcome(state)
    assert [(round_, counted) for round_, _, _, counted in found.updates] == [(1, 1)] * 4 + [(2, 1)] * 4
    return found


def plain() -> dict[str, Any]:
    return {**tables(), "output": {"keep_checkpoints": 2}}  # so that checkpoints are dropped on the way


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("point", [*PLAIN, *(f"{name}:{count}" for name, count in LATER.items())])
def test_a_run_killed_at_a_point_ends_as_if_nothing_had_been(
    point: str, zygote: Zygote, undisturbed: Outcome, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    assert zygote.hold(state, plain(), point) == -9, "the point was not reached"
    assert zygote.hold(state, plain()) == 0
    assert outcome(state) == undisturbed
    assert zygote.hold(state, plain()) == 0, "a finished run is left alone"
    assert outcome(state) == undisturbed
    leftovers = [path.name for path in (state / "runs").rglob("*") if "partial" in path.name]
    assert leftovers == []


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_if_nothing_had_been(
    zygote: Zygote, undisturbed: Outcome, tmp_path: Path
) -> None:
    """Every point in turn, on one state, so that the run gets on by a step with each life."""
    state = tmp_path / "state"
    for point in LIFE:
        assert zygote.hold(state, plain(), point) == -9, f"{point} was not reached"
    assert zygote.hold(state, plain()) == 0
    assert outcome(state) == undisturbed


@pytest.mark.slow
def test_an_over_selected_round_counts_the_same_ones_after_a_kill(zygote: Zygote, tmp_path: Path) -> None:
    """Three of four: killed with two of them, with the round decided and not yet committed, and later."""
    chosen = {"sampling": {"kind": "fixed", "cohort": 3}, "over_selection": 0.3}
    run = plain() | {"federation": chosen}
    assert zygote.hold(tmp_path / "calm", run) == 0
    calm, state = outcome(tmp_path / "calm"), tmp_path / "state"
    for point in ("server.accept.committed:2", "server.checkpoint.written", "server.accept.inserted:2"):
        assert zygote.hold(state, run, point) == -9, f"{point} was not reached"
    assert zygote.hold(state, run) == 0
    assert outcome(state) == calm
    assert [number for number, *_ in calm.updates] == [1] * 3 + [2] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [
        *(pytest.param(point, marks=pytest.mark.exhaustive) for point in PRIVATE[:-1]),
        PRIVATE[-1],
        "server.commit.counted:2",
        pytest.param("server.accept.committed:2", marks=pytest.mark.exhaustive),
    ],
)
def test_a_private_run_pays_for_each_round_once(point: str, zygote: Zygote, tmp_path: Path) -> None:
    private = tables() | {
        "privacy": {
            "kind": "client-level",
            "clip_norm": 1.0,
            "noise_multiplier": 2.0,
            "target_delta": 1e-3,
            "max_epsilon": 100.0,
        }
    }
    everyone = {"kind": "poisson", "rate": 1.0}
    private["federation"] = {"sampling": everyone, "weighting": "uniform", "quorum": 0.0}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert zygote.hold(whole, private) == 0
    assert zygote.hold(killed, private, point) == -9
    assert zygote.hold(killed, private) == 0
    ((expected,),) = asked(whole, "SELECT ledger FROM budget")
    assert asked(killed, "SELECT ledger FROM budget") == [(expected,)]
    rounds = [json.loads(row)["round"] for (row,) in asked(killed, "SELECT row FROM rounds ORDER BY number")]
    assert rounds == [0, 1, 2]
