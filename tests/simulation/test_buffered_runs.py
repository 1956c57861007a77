"""Mode 'buffered' from the run file on: what is refused, what is planned, and the same bytes every time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedpeft.config.run_file import build_run
from fedpeft.errors import StateError, UsageError
from fedpeft.ledger import RunFolder
from fedpeft.planning.buffered_draws import draw_buffered
from fedpeft.planning.draws import draw_rounds
from fedpeft.planning.preflight import problems_of
from fedpeft.transport.roster import Member, Roster
from tests.flower.buffered_apps import EXAMPLES
from tests.flower.test_buffered_rounds import CLOCK, held, run_of
from tests.simulation.runs import fingerprint, resumed, simulated
from tests.simulation.test_resume import _kill_when, _start

BUFFER = {"size": 2, "concurrency": 4, "max_staleness": 3}
SCALARS: dict[str, Any] = {
    "training": {"kind": "zeroth-order", "steps": 4, "batch_size": 4, "lr": 1e-3},
    "space": {"kind": "seed-scalars", "mode": "common", "num_seeds": 4},
}
LOCAL = {
    "kind": "local",
    "clip_norm": 1.0,
    "noise_multiplier": 1.0,
    "target_delta": 1e-5,
    "max_epsilon": 1e6,
    "seeded": True,
}


@pytest.fixture
def buffered(tables: dict[str, Any]) -> dict[str, Any]:
    """Six rounds of two updates; four clients, all at work all the time."""
    tables["run"]["rounds"] = 6
    tables["training"]["steps"] = 1
    clock = {"speed_sigma": 0.8, "examples_per_s": 10.0}
    tables["federation"] = {"mode": "buffered", "buffer": BUFFER, "clock": clock}
    return tables


def test_it_is_sound_as_it_is(buffered: dict[str, Any]) -> None:
    assert problems_of(build_run(buffered, source="test")) == []
    assert problems_of(build_run(buffered | SCALARS, source="test")) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"federation": {"strategy": "fedmedian"}}, "fedmedian compares updates of one round"),
        ({"federation": {"strategy": {"kind": "krum", "num_malicious_nodes": 0}}}, "start from different"),
        ({"federation": {"sampling": {"kind": "fixed", "cohort": 2}}}, "draws no cohorts"),
        ({"federation": {"over_selection": 0.5}}, "waits for nobody"),
        ({"federation": {"buffer": BUFFER | {"size": 5}}}, "buffer.size: 5 updates make a round"),
        ({"federation": {"buffer": BUFFER | {"concurrency": 5}}}, "5 clients shall work at a time"),
        (
            {"federation": {"buffer": BUFFER | {"staleness_weight": "linear"}}},
            "staleness_weight: unknown kind 'linear'",
        ),
        (
            {
                "federation": {
                    "buffer": BUFFER | {"staleness_weight": {"kind": "polynomial", "exponent": 9.0}}
                }
            },
            "lower it, or the decay of weights",
        ),
        ({"space": "projected"}, "coefficients of 'projected' belong to the directions of one round"),
        ({"stages": [{"kind": "top-k", "density": 0.1, "error_feedback": True}]}, "counts on every update"),
        ({"output": {"keep_checkpoints": 3}}, "keep at least 4"),
        ({"federation": {"lora_rule": "ffa"}}, "in federation.mode 'buffered' they started from several"),
        (
            {"groups": [{"clients": ["client-0"], "peft": {"r": 1}}]},
            "groups.0: clients that hold another base",
        ),
        (
            {
                "privacy": {
                    "kind": "client-level",
                    "clip_norm": 1.0,
                    "noise_multiplier": 1.0,
                    "target_delta": 1e-3,
                    "max_epsilon": 10.0,
                }
            },
            "client-level noise is made for secret cohorts",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_reason(
    buffered: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    federation = buffered["federation"] | changes.get("federation", {})
    run = build_run({**buffered, **changes, "federation": federation}, source="test")
    assert any(reason in problem for problem in problems_of(run)), problems_of(run)


@pytest.mark.parametrize(
    ("federation", "words"),
    [({"mode": "buffered"}, "give its size and concurrency"), ({"buffer": BUFFER}, "set mode = 'buffered'")],
)
def test_mode_and_buffer_come_together(
    tables: dict[str, Any], federation: dict[str, Any], words: str
) -> None:
    with pytest.raises(Exception, match=words):
        build_run(tables | {"federation": federation}, source="test")


def test_a_simulation_needs_the_clock(buffered: dict[str, Any], tmp_path: Path) -> None:
    del buffered["federation"]["clock"]
    with pytest.raises(UsageError, match="needs a virtual clock in a simulation"):
        simulated(buffered, tmp_path / "run")


def test_the_plan_foretells_the_rounds() -> None:
    run = run_of(9, {"size": 2, "concurrency": 5, "max_staleness": 3}, clock=CLOCK | {"dropout": 0.1})
    roster = Roster({f"client-{number}": Member(number + 1, EXAMPLES) for number in range(9)}, "")
    cohorts, plan, problems = draw_buffered(run, roster, 9, bytes_down=0, bytes_up=0)
    rows = held(run, clients=9).rows[1:]
    assert problems == []
    for cohort, row in zip(cohorts, rows, strict=True):
        folded = [item.client for item in row.outcomes if item.status == "folded"]
        assert list(cohort.working) == folded
        assert len(cohort.lost) == len(row.outcomes) - len(folded)
        assert cohort.virtual_s == pytest.approx(row.virtual_s, abs=1e-3)
    ages = [item.staleness or 0 for row in rows for item in row.outcomes if item.status == "folded"]
    assert list(plan.staleness) == [ages.count(age) for age in range(max(ages) + 1)]
    assert plan.mean_staleness == pytest.approx(sum(ages) / len(ages))
    without = run_of(9, {"size": 2, "concurrency": 5}, clock=None)
    rounds, _ = draw_rounds(without, dict.fromkeys(roster.members, EXAMPLES), bytes_down=0, bytes_up=0)
    assert rounds.buffered is not None
    assert rounds.buffered.equal_speeds
    assert rounds.run_s is None


def test_a_run_of_a_real_model_goes_on_with_work_under_way(buffered: dict[str, Any], tmp_path: Path) -> None:
    simulated(buffered, tmp_path / "whole")
    simulated(buffered, tmp_path / "cut")
    for number in (4, 5, 6):
        (tmp_path / "cut" / "checkpoints" / f"round-{number:06d}.safetensors").unlink()
    (tmp_path / "cut" / "report.html").unlink()
    resumed(tmp_path / "cut")
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert sum(summary["staleness"]["updates"]) == 12
    assert summary["staleness"]["most"] > 0
    assert "Staleness of the updates" in (tmp_path / "whole" / "report.html").read_text()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_workers_and_kills_change_nothing(buffered: dict[str, Any], tmp_path: Path) -> None:
    simulated(buffered, tmp_path / "undisturbed", workers=1)
    run_file, out = tmp_path / "run.toml", tmp_path / "killed"
    run_file.write_text(tomli_w.dumps(buffered))
    for number, start in ((1, (str(run_file), "--out", str(out))), (4, ("--resume", str(out)))):
        there = out / "checkpoints" / f"round-{number:06d}.safetensors"
        _kill_when(_start(*start), there.exists)
        _wait_until_free(out)
    resumed(out, workers=3)
    assert fingerprint(out) == fingerprint(tmp_path / "undisturbed")


def _wait_until_free(out: Path) -> None:
    """Workers of a process that was killed hold its lock for a moment."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with RunFolder.resume(out):
                return
        except StateError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@pytest.mark.slow
def test_scalars_of_several_rounds_directions_go_on_and_end_the_same(
    buffered: dict[str, Any], tmp_path: Path
) -> None:
    buffered |= SCALARS
    simulated(buffered, tmp_path / "whole")
    simulated(buffered, tmp_path / "cut", workers=2)
    for number in (3, 4, 5, 6):
        (tmp_path / "cut" / "checkpoints" / f"round-{number:06d}.safetensors").unlink()
    (tmp_path / "cut" / "report.html").unlink()
    resumed(tmp_path / "cut")
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "whole")
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any(len(row["staleness"]) > 1 for row in rows if row["event"] == "round")


@pytest.mark.slow
def test_with_local_noise_everyone_pays_for_each_asking(buffered: dict[str, Any], tmp_path: Path) -> None:
    buffered["privacy"] = LOCAL
    simulated(buffered, tmp_path / "run")
    spent = json.loads((tmp_path / "run" / "privacy.json").read_text())
    charges = {(number, holder) for number, holder, _ in spent["charges"]}
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rounds = [row for row in rows if row["event"] == "round"]
    done = {(row["round"] - item["staleness"], item["client"]) for row in rounds for item in row["outcomes"]}
    assert done < charges
    assert len(charges - done) == 2, "who was at work at the end has paid too"
    assert rounds[-1]["epsilon"] > 0
