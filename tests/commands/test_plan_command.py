"""`fedpeft plan` says what a run then does, and everything that keeps it from running."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.config.run_file import build_run
from fedpeft.config.sections import RunConfig
from fedpeft.planning.draws import draw_rounds
from fedpeft.planning.loading import Problems, load
from fedpeft.planning.plan import make_plan
from fedpeft.spaces import build_space
from fedpeft.spaces.projected import Projected
from fedpeft.spaces.seed_scalars import SeedScalars
from fedpeft.wire.codec import Envelope, encode
from tests.commands.calling import TINY, Call, overrides


def plan_of(call: Call, *items: str) -> dict[str, Any]:
    code, out, _ = call("plan", "--json", *overrides(*TINY, *items))
    plan: dict[str, Any] = json.loads(out)
    assert code == (3 if plan["problems"] else 0)
    return plan


def test_plan_foretells_what_the_run_did(call: Call, tiny_rows: list[dict[str, Any]]) -> None:
    plan = plan_of(call)
    started = tiny_rows[0]
    outcomes = next(row for row in tiny_rows if row.get("round") == 1)["outcomes"]
    assert plan["run_digest"] == started["run_digest"]
    assert plan["model"]["trained"] == started["trainable_parameters"]
    assert plan["model"]["total"] == started["total_parameters"]
    assert plan["data"]["clients"] == len(started["clients"])
    assert plan["data"]["rows"] == sum(started["clients"].values())
    assert plan["data"]["test_rows"] == started["test_examples"]
    assert plan["rounds"]["exchanges"] == len(outcomes)
    assert plan["rounds"]["steps"] == sum(outcome["steps"] for outcome in outcomes)
    assert plan["rounds"]["examples"] == sum(outcome["examples"] for outcome in outcomes)
    assert {o["bytes_up"] for o in outcomes} == {plan["traffic"]["up_per_round"]}
    assert {o["bytes_down"] for o in outcomes} == {plan["traffic"]["down_per_round"]}
    assert plan["traffic"]["up_total"] == sum(outcome["bytes_up"] for outcome in outcomes)


def test_plan_for_people(call: Call) -> None:
    code, out, _ = call("plan", *overrides(*TINY))
    assert code == 0
    assert "78,848" in out
    assert "313 KiB" in out
    assert out.rstrip().endswith("would be refused: nothing")


def test_plan_names_every_problem_at_once(call: Call) -> None:
    plan = plan_of(
        call,
        "training.optimizer=adamm",
        "evaluation.metrics=['accuracy']",
        'federation.sampling={kind="fixed", cohort=9}',
        'peft.target_modules=["nope"]',
        "stages=[{kind='zip'}]",
    )
    for piece in ("'adamm'", "'accuracy'", "cohort is 9", "names 'nope'", "'zip'"):
        assert len([line for line in plan["problems"] if piece in line]) == 1, piece
    assert len(plan["problems"]) == 5
    assert plan["data"]["rows"] == 32  # what can be known is still said
    assert plan["model"] is None


def test_plan_finds_problems_of_rows_and_model_together(call: Call, tmp_path: Path) -> None:
    rows = [{"text": "a tale", "who": name} for name in "aabb"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.toml").write_text(
        "[run]\nname = 'x'\nrounds = 1\n[data]\ntrain = 'rows.jsonl'\ntext = '{text}'\n"
        "partitioner = { kind = 'natural', by = 'who' }\n"
        "[federation]\nsampling = { kind = 'fixed', cohort = 5 }\n"
    )
    code, _, _ = call("plan", str(tmp_path / "run.toml"), "--set", "federation.sampling.cohort=2")
    assert code == 0
    code, out, _ = call("plan", str(tmp_path / "run.toml"), "--set", "peft.rr=3")
    assert code == 3
    assert "cohort is 5 and there are 2 clients" in out
    assert "peft.rr" in out
    code, out, _ = call("plan", str(tmp_path / "run.toml"), *overrides("data.text={tale}", "model.path=./no"))
    assert code == 3
    assert "'tale'" in out
    assert "model.path './no'" in out


def test_plan_of_a_broken_run_file_is_its_problems(call: Call) -> None:
    code, out, _ = call("plan", "--json", *overrides("training.lrr=1", "run.rounds=0"))
    assert code == 3
    plan = json.loads(out)
    assert plan["memory"] is None
    assert len(plan["problems"]) == 2
    assert call("plan", "--set", "nonsense")[0] == 2


def test_plan_computes_the_virtual_round(call: Call) -> None:
    clock = "federation.clock={examples_per_s=10.0, bytes_per_s=1000.0, latency_s=0.5}"
    plan = plan_of(call, clock, "run.rounds=3")
    # The clock takes the first update to weigh what the state weighs; later ones weigh what came.
    transfer = (plan["traffic"]["down_per_round"] + plan["traffic"]["up_per_round"]) / 1000
    expected = 0.5 + transfer + 16 / 10
    assert plan["rounds"]["round_s"]["mean"] == pytest.approx(expected)
    assert plan["rounds"]["run_s"] == pytest.approx(3 * expected)
    assert plan["rounds"]["lost"] == 0.0


def test_plan_foresees_rounds_without_quorum(call: Call) -> None:
    plan = plan_of(call, "federation.clock={latency_s=2.0}", "federation.deadline_s=1.0", "run.rounds=5")
    (problem,) = plan["problems"]
    assert "round 1 (0 of 2), round 2 (0 of 2), round 3 (0 of 2) and 2 more" in problem
    assert plan["rounds"]["lost"] == 1.0
    assert plan["rounds"]["examples"] == 0


def test_draws_count_steps_and_examples() -> None:
    rows = {"a": 3, "b": 8, "c": 9}
    table = {
        "run": {"name": "x", "rounds": 4},
        "training": {"epochs": 1.0, "batch_size": 4},
        "data": {"partitioner": {"kind": "iid", "clients": 3}},
    }
    plan, problems = draw_rounds(RunConfig.model_validate(table), rows, bytes_down=1, bytes_up=1)
    assert problems == []
    assert plan.steps == 4 * (1 + 2 + 3)
    assert plan.examples == 4 * (1 * 3 + 2 * 4 + 3 * 4)
    assert plan.exchanges == 12
    sampled = RunConfig.model_validate(
        table
        | {"run": {"name": "x", "rounds": 30}, "federation": {"sampling": {"kind": "fixed", "cohort": 2}}}
    )
    plan, _ = draw_rounds(sampled, rows, bytes_down=1, bytes_up=1)
    assert plan.exchanges == 60
    assert plan.participations_per_client.mean == 20
    assert plan.participations_per_client.least < 20 < plan.participations_per_client.most
    assert math.isclose(plan.asked_per_round.mean, 2)


def test_draws_foresee_a_rule_that_starves() -> None:
    run = RunConfig.model_validate(
        {
            "run": {"name": "x", "rounds": 2},
            "federation": {
                "strategy": {"kind": "krum", "num_malicious_nodes": 1},
                "clock": {"latency_s": 0.0, "examples_per_s": 1.0},
                "deadline_s": 8.5,
                "quorum": 0.1,
            },
            "training": {"steps": 1, "batch_size": 9},
        }
    )
    plan, problems = draw_rounds(run, {"a": 8, "b": 8, "c": 8, "d": 8, "e": 9}, bytes_down=0, bytes_up=0)
    assert plan.exchanges == 8
    assert len(problems) == 1
    assert "krum needs 5 updates, and round 1 (4), round 2 (4) would bring fewer" in problems[0]


@pytest.mark.parametrize(
    ("space", "training"),
    [
        ({"num_seeds": 4096}, {}),
        ({"num_seeds": 4096, "mode": "fedkseed-pro"}, {}),
        ({"num_seeds": 200, "mode": "common"}, {}),
        ({"kind": "projected", "num_seeds": 64}, {"kind": "first-order"}),
        ({"kind": "projected", "num_seeds": 64, "projection": "srht"}, {"kind": "first-order"}),
    ],
)
def test_plan_of_an_exact_space_has_steps_and_a_replay_time(
    space: dict[str, Any], training: dict[str, Any]
) -> None:
    """What is sent down is one round's step; the time is that of a replay, by orders of magnitude."""
    tables = {
        "run": {"name": "seeds", "rounds": 30},
        "peft": {"method": "lora", "r": 4},
        "data": {"partitioner": {"kind": "iid", "clients": 8}},
        "training": {"kind": "zeroth-order", "steps": 200, "lr": 1e-3, **training},
        "space": {"kind": "seed-scalars", **space},
        "evaluation": {"metrics": ["loss"]},
    }
    run = build_run(tables, source="test")
    plan = make_plan(run)
    assert plan.problems == ()
    assert plan.space is not None
    assert plan.traffic is not None
    assert plan.space.replay_s is not None
    problems = Problems()
    _, model = load(run, problems)
    assert model is not None
    opened = build_space(run, model)
    assert isinstance(opened, SeedScalars | Projected)
    state, _ = opened.example(opened.initial_state({}), 200, np.random.default_rng(0))
    began = time.perf_counter()
    opened._move({**state, "next": np.array([30])} if isinstance(opened, Projected) else state)
    took = time.perf_counter() - began
    assert took / 50 < plan.space.replay_s < 50 * took
    whole = len(encode(Envelope(state, "ab" * 32, 1, "cd" * 32, opened.kind)))
    assert plan.traffic.down_per_round < whole
    if space.get("kind") is None:
        assert plan.traffic.down_per_round <= 8192
        assert plan.traffic.up_per_round <= (1536 if "pro" in space.get("mode", "") else 1024)


def test_plan_shows_the_replay(call: Call) -> None:
    code, out, _ = call(
        "plan", *overrides(*TINY, 'training.kind="zeroth-order"', 'space={kind="seed-scalars", num_seeds=64}')
    )
    assert "directions (K)" in out
    assert "replay of a whole run" in out, (code, out)
