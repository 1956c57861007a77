"""What a private run file may not ask for: each refused in one line with its reason, all of them at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from fedpeft.config.run_file import build_run
from fedpeft.errors import PrivacyError, RunFileError
from fedpeft.planning.preflight import problems_of
from fedpeft.privacy.noise_sources import refuse_seeded

COMMON = {"noise_multiplier": 1.0, "target_delta": 1e-5, "max_epsilon": 50.0}
PRIVACY: dict[str, dict[str, Any]] = {
    "client-level": {"kind": "client-level", "clip_norm": 0.5, **COMMON},
    "record-level": {
        "kind": "record-level",
        "max_grad_norm": 1.0,
        "sample_rate": 0.1,
        "expected_batch_size": 8,
        **COMMON,
    },
    "local": {"kind": "local", "clip_norm": 0.5, **COMMON},
}


def tables(kind: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A sound run file of a kind, with dotted keys changed; None takes a key away."""
    made: dict[str, Any] = {
        "run": {"name": "p", "rounds": 2},
        "peft": {"method": "lora"},
        "data": {"partitioner": {"kind": "iid", "clients": 4}},
        "training": {"steps": 2},
        "federation": {"weighting": "uniform", "sampling": {"kind": "poisson", "rate": 0.5}},
        "privacy": copy.deepcopy(PRIVACY[kind]),
    }
    for dotted, value in (changes or {}).items():
        *path, last = dotted.split(".")
        node = made
        for key in path:
            node = node.setdefault(key, {})
        if value is None:
            del node[last]
        else:
            node[last] = value
    return made


@pytest.mark.parametrize("kind", sorted(PRIVACY))
def test_a_sound_file_is_not_refused(kind: str) -> None:
    assert problems_of(build_run(tables(kind), source="x")) == []


FIXED = {"kind": "fixed", "cohort": 2}
TERNARY = {"kind": "ternary", "error_feedback": True}


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("client-level", {"federation.sampling": FIXED}, "accounted for Poisson sampling"),
        ("client-level", {"federation.weighting": "examples"}, "privacy.max_weight"),
        ("client-level", {"privacy.max_weight": 4}, "all weights are 1"),
        ("client-level", {"federation.strategy": "fedmedian"}, "looks at single updates"),
        ("client-level", {"evaluation.baselines": True}, "without noise"),
        ("client-level", {"privacy.max_epsilon": 0.1}, "one round costs"),
        ("client-level", {"data.user": "who"}, "protects clients"),
        ("client-level", {"data.train": "x.csv", "data.limit": 9}, "data.limit"),
        (
            "client-level",
            {"data.train": "x.csv", "data.partitioner": {"kind": "files", "clients": 3}},
            "the largest clients are taken",
        ),
        ("client-level", {"data.partitioner.clients": 500, "privacy.target_delta": 2e-3}, "500 clients"),
        ("local", {"data.partitioner.clients": 500, "privacy.target_delta": 2e-3}, "500 clients"),
        ("record-level", {"privacy.expected_batch_size": 20, "privacy.target_delta": 5e-3}, "for 200 rows"),
        ("record-level", {"data.train": "x.csv", "data.limit": 9}, "data.limit"),
        (
            "client-level",
            {
                "space": {"kind": "seed-scalars", "mode": "fedkseed-pro"},
                "training": {"kind": "zeroth-order", "steps": 2},
            },
            "a further release",
        ),
        ("record-level", {"training.steps": None}, "how many rows a client has"),
        ("record-level", {"training.kind": "none"}, "no records to protect"),
        ("record-level", {"federation.weighting": "examples"}, "is private"),
        ("record-level", {"stages": [TERNARY]}, "memory on the client"),
        ("record-level", {"data.explode": "turns"}, "data.user"),
        ("record-level", {"data.explode": "turns", "data.user": "turns"}, "another than the one"),
        (
            "record-level",
            {"groups": [{"clients": ["client-0"], "training": {"lr": 0.1}}]},
            "are accounted for alike",
        ),
        (
            "record-level",
            {"training": {"kind": "zeroth-order", "rule": "conservative", "steps": 2}},
            "beyond the noised scalars",
        ),
        ("record-level", {"training.fused_update": True}, "each row's own gradient"),
        ("record-level", {"training.gradient_accumulation": 2}, "one Poisson batch"),
        ("record-level", {"federation.strategy": "qfedavg"}, "losses"),
        ("local", {"stages": [{"kind": "ternary"}, {"kind": "noise"}]}, "add the noise first"),
        ("local", {"stages": [{"kind": "clip", "clip_norm": 1.0}]}, "clip first"),
        ("local", {"stages": [{"kind": "noise"}, {"kind": "noise"}]}, "one draw of noise"),
        ("local", {"stages": [{"kind": "noise", "clip_norm": 1.0}]}, "its options are those of [privacy]"),
        ("local", {"federation.weighting": "examples"}, "is private"),
        ("client-level", {"stages": [{"kind": "noise"}]}, "[privacy] kind 'local'"),
    ],
)
def test_refusals(kind: str, changes: dict[str, Any], says: str) -> None:
    problems = problems_of(build_run(tables(kind, changes), source="x"))
    assert any(says in problem for problem in problems), problems
    assert all("\n" not in problem for problem in problems)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("client-level", {"stages": [TERNARY]}),  # the server clips what it decodes
        ("client-level", {"federation.sampling": {"kind": "all"}}),  # a coin that always shows heads
        ("client-level", {"federation.weighting": "examples", "privacy.max_weight": 4}),
        ("client-level", {"federation.strategy": {"kind": "fedadam", "eta": 0.01}}),
        ("record-level", {"federation.sampling": FIXED}),  # nothing is amplified by the cohort
        ("record-level", {"peft.method": "prompt"}),  # rows go through the model one at a time
        ("record-level", {"training.precision": "bf16", "training.gradient_checkpointing": True}),
        ("record-level", {"data.limit": 9}),  # so many embedded rows are made
        ("client-level", {"data.partitioner.clients": 499, "privacy.target_delta": 2e-3}),
        ("record-level", {"privacy.expected_batch_size": 20, "privacy.target_delta": 4.9e-3}),
        ("record-level", {"stages": [{"kind": "ternary"}]}),
        ("local", {"stages": [{"kind": "clip", "clip_norm": 1.0}, {"kind": "noise"}, {"kind": "ternary"}]}),
    ],
)
def test_what_is_free_is_allowed(kind: str, changes: dict[str, Any]) -> None:
    assert problems_of(build_run(tables(kind, changes), source="x")) == []


def test_all_problems_come_at_once() -> None:
    changes = {"federation.sampling": FIXED, "federation.weighting": "examples", "evaluation.baselines": True}
    problems = problems_of(build_run(tables("client-level", changes), source="x"))
    assert [problem.split()[0].rstrip(":") for problem in problems] == [
        "evaluation.baselines",
        "federation.sampling",
        "federation.weighting",
    ]


def test_keys_of_another_kind_are_unknown() -> None:
    wrong = {"privacy.sample_rate": 0.1, "privacy.clip_norm": -1.0, "privacy.target_delta": 1.0}
    with pytest.raises(RunFileError) as caught:
        build_run(tables("client-level", wrong), source="x")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert any(line.startswith("x: privacy.sample_rate: unknown key") for line in lines)
    with pytest.raises(RunFileError, match=r"privacy\.kind: 'central' came; use one of 'client-level'"):
        build_run(tables("client-level", {"privacy.kind": "central"}), source="x")
    with pytest.raises(RunFileError, match="needed and missing"):
        build_run(tables("client-level", {"privacy.kind": None}), source="x")


@pytest.mark.parametrize("delta", [1e-2, 0.9, 0.0])
@pytest.mark.parametrize("kind", sorted(PRIVACY))
def test_a_delta_that_promises_nothing_is_refused(kind: str, delta: float) -> None:
    with pytest.raises(RunFileError, match=r"privacy\.target_delta"):
        build_run(tables(kind, {"privacy.target_delta": delta}), source="x")


def test_adaptive_keys_go_with_a_quantile() -> None:
    with pytest.raises(RunFileError, match="without target_quantile"):
        build_run(tables("client-level", {"privacy.count_std": 2.0}), source="x")
    narrow = {"privacy.target_quantile": 0.5, "privacy.count_std": 0.5}
    with pytest.raises(RunFileError, match="give more than"):
        build_run(tables("client-level", narrow), source="x")


def test_the_user_column_is_for_record_level_privacy_only() -> None:
    public = tables("local", {"data.user": "who", "privacy": None})
    assert any("data.user" in problem for problem in problems_of(build_run(public, source="x")))


@pytest.mark.parametrize("kind", sorted(PRIVACY))
def test_deployed_runs_refuse_seeded_noise(kind: str) -> None:
    seeded = build_run(tables(kind, {"privacy.seeded": True}), source="x")
    with pytest.raises(PrivacyError, match="not a simulation"):
        refuse_seeded(seeded)
    refuse_seeded(build_run(tables(kind), source="x"))
    refuse_seeded(build_run(tables(kind, {"privacy": None}), source="x"))
