"""Which stages go together, and how a run file that asks for others is refused."""

from __future__ import annotations

from typing import Any

import pytest

from fedpeft.compatibility import conflicts_of
from fedpeft.config.sections import RunConfig
from fedpeft.errors import RunFileError
from fedpeft.planning.preflight import problems_of
from fedpeft.stages import build_stages, derive_payload, stage_list
from fedpeft.stages.base import Role
from fedpeft.stages.composition import composition_problems


def run_with(*stages: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate({"run": {"name": "r", "rounds": 1}, "stages": list(stages)})


CLIP, TERNARY = {"kind": "clip", "clip_norm": 1.0}, {"kind": "ternary", "density": 0.05}


def test_clip_then_compress_is_allowed() -> None:
    stages = build_stages(run_with(CLIP, {"kind": "identity"}, TERNARY))
    assert derive_payload(stages) == "ternary"
    assert stage_list(stages) == (
        ("weigh", "{}"),
        ("clip", '{"clip_norm":1.0}'),
        ("identity", "{}"),
        ("ternary", '{"density":0.05}'),
    )
    assert derive_payload(build_stages(run_with(CLIP))) == "dense"


@pytest.mark.parametrize(
    ("stages", "needles"),
    [
        ([TERNARY, {"kind": "sign"}], ["stages.1 (sign)", "stages.0 (ternary)", "only one stage"]),
        ([TERNARY, CLIP], ["stages.1 (clip)", "clip before"]),
        ([{"kind": "dare", "error_feedback": True}], ["stages.0.error_feedback", "random-k"]),
        ([{"kind": "quantise", "bits": 2, "error_feedback": True}], ["stages.0.error_feedback", "4 or 8"]),
        ([{"kind": "quantise", "bits": 3}], ["stages.0.bits"]),
        ([{"kind": "ternary", "scale": "fixed"}], ["stages.0.value", "needs a value"]),
        ([{"kind": "ternary", "value": 1.0}], ["stages.0.value", "'fixed' only"]),
        ([{"kind": "ternary", "alpha": 2.0}], ["stages.0.alpha"]),
        ([{"kind": "compeft", "alpha": -1.0}], ["stages.0.alpha", "a number above 0"]),
        ([{"kind": "top-k", "density": 0.0}], ["stages.0.density"]),
    ],
)
def test_nonsense_is_refused_when_the_run_file_is_read(
    stages: list[dict[str, Any]], needles: list[str]
) -> None:
    problems = problems_of(run_with(*stages))
    assert len(problems) == 1
    assert all(needle in problems[0] for needle in needles), problems


def test_all_problems_of_all_stages_come_at_once() -> None:
    with pytest.raises(RunFileError) as caught:
        build_stages(run_with({"kind": "top-k", "density": 2}, {"kind": "sign"}, CLIP))
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize(
    ("roles", "count"),
    [
        (["bound", "noise", "lossy"], 0),
        (["bound", "mask"], 0),
        (["noise", "bound"], 1),
        (["lossy", "noise"], 1),
        (["mask", "lossy"], 1),
        (["lossy", "mask", "noise"], 3),
    ],
)
def test_noise_and_masks_have_their_places(roles: list[Role], count: int) -> None:
    assert len(composition_problems([(role, role) for role in roles])) == count


def test_nothing_is_lost_of_exact_integers() -> None:
    tables = {"run": {"name": "r", "rounds": 1}, "space": "seed-scalars", "stages": [CLIP, {"kind": "sign"}]}
    run = RunConfig.model_validate({**tables, "training": {"kind": "zeroth-order"}})
    (problem,) = (p for p in conflicts_of(run) if p.code == "stage-lossy-integers")
    assert problem.startswith("stages.1 (sign)")
