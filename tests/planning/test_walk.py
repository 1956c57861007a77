"""What plan says of a zeroth-order run's rate, held against runs that were measured."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fedpeft.config.run_file import build_run
from fedpeft.planning.plan import make_plan
from fedpeft.planning.walk import WalkPlan


def walk_of(lr: float, **training: Any) -> WalkPlan | None:
    """Of runs whose losses were seen on seeds 0 to 2: they rise at a rate of 1e-2 and fall at 3e-3."""
    section = {"kind": "zeroth-order", "steps": 6, "batch_size": 8, "radius": 1e-3, "lr": lr, **training}
    tables = {
        "run": {"name": "walk", "rounds": 3},
        "peft": {"method": "lora", "r": 4},
        "data": {
            "limit": 96,
            "test_limit": 16,
            "max_length": 96,
            "partitioner": {"kind": "iid", "clients": 3},
        },
        "training": section,
        "space": {"kind": "seed-scalars", "num_seeds": 64} if "rule" not in training else "adapter-delta",
    }
    plan = make_plan(build_run(tables, source="test"))
    assert plan.problems == ()
    return plan.walk


def test_a_rate_at_which_runs_diverged_is_named_and_one_at_which_they_learned_is_not() -> None:
    fast, slow = walk_of(1e-2), walk_of(3e-3)
    assert fast is not None
    assert slow is not None
    assert fast.diverges
    assert not slow.diverges
    assert fast.length == pytest.approx(slow.length * 1e-2 / 3e-3)
    assert slow.safe_lr == 3e-3
    assert fast.safe_lr < 1e-2


def test_more_queries_make_a_shorter_walk() -> None:
    one, four = walk_of(1e-3), walk_of(1e-3, queries=4)
    assert one is not None
    assert four is not None
    assert four.length == pytest.approx(one.length / 2.0)


@pytest.mark.parametrize("rule", ["sign", "adam"])
def test_rules_whose_steps_are_no_multiples_of_slopes_have_no_walk(rule: str) -> None:
    assert walk_of(1e-3, rule=rule) is None


def test_a_walk_that_ends_in_no_number_diverges() -> None:
    assert WalkPlan(1.0, 5.0, math.nan, 0.1).diverges
    assert WalkPlan(1.0, 5.0, math.inf, 0.1).diverges
