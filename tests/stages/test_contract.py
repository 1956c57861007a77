"""What every stage promises, tried on each of the table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from fedpeft.errors import UpdateError
from fedpeft.stages import STAGES, derive_payload, on_client
from fedpeft.stages.composition import REFUSED
from fedpeft.updates.update import Update, arrays_digest, layout_of
from tests.stages.oracles import CHECKS, largest
from tests.stages.passing import SHAPES, built, context, drawn, passed, received, sent, wide, zeros

CASES: Mapping[str, list[dict[str, Any]]] = {
    "clip": [{"clip_norm": 0.01}, {"clip_norm": 100.0}],
    "compeft": [{"density": 0.1}, {"density": 0.3, "alpha": 2.0}, {"density": 0.3, "error_feedback": True}],
    "dare": [{"drop_rate": 0.5}, {"drop_rate": 0.0}],
    "identity": [{}],
    "quantise": [{"bits": 8}, {"bits": 4, "error_feedback": True}, {"bits": 2}],
    "random-k": [{"density": 0.2}, {"density": 0.2, "error_feedback": True}],
    "sign": [{}, {"error_feedback": True}],
    "ternary": [
        {"density": 0.1},
        {"density": 0.05, "scale": "fixed", "value": 0.002},
        {"density": 1.0, "error_feedback": True},
    ],
    "top-k": [{"density": 0.1}, {"density": 1.0}, {"density": 0.1, "error_feedback": True}],
    "weigh": [{"by": "examples"}, {"by": "uniform"}],
}
EVERY = [(kind, options) for kind, cases in CASES.items() for options in cases]
LOSSY = [(kind, options) for kind, options in EVERY if STAGES[kind].role == "lossy"]
FED_BACK = [(kind, options) for kind, options in LOSSY if options.get("error_feedback")]

TOGETHER = ("clip", "compeft")  # what they do to a tensor depends on the others: tests of their own

every = pytest.mark.parametrize(("kind", "options"), EVERY, ids=str)
lossy = pytest.mark.parametrize(("kind", "options"), LOSSY, ids=str)
fed_back = pytest.mark.parametrize(("kind", "options"), FED_BACK, ids=str)


def test_the_suite_knows_every_stage() -> None:
    assert len(STAGES) == 10
    assert set(CASES) == set(STAGES)
    roles = {role for pair in REFUSED for role in pair} | {"weigh", "neutral"}
    for kind, stage in STAGES.items():
        assert stage.kind == kind
        assert stage.role in roles
    assert set(CHECKS) | set(TOGETHER) == set(STAGES)


@every
def test_round_trip_is_finite_and_keeps_the_layout(kind: str, options: dict[str, Any]) -> None:
    stages, update = [built(kind, options)], drawn()
    before = arrays_digest(update.arrays)
    result = passed(stages, update, context())
    assert layout_of(result.arrays) == layout_of(update.arrays)
    assert result.is_finite()
    assert not result.encoded
    assert result.weight == (1 if options.get("by") == "uniform" else 17)
    assert result.metrics["loss"] == 0.5
    assert arrays_digest(update.arrays) == before


@every
def test_the_same_update_gives_the_same_bytes(kind: str, options: dict[str, Any]) -> None:
    stages = [built(kind, options)]
    assert sent(stages, drawn(), context()) == sent([built(kind, options)], drawn(), context())
    assert sent(stages, drawn(), context()) != sent(stages, drawn(1), context())


@every
def test_an_all_zero_update_stays_zero(kind: str, options: dict[str, Any]) -> None:
    result = passed([built(kind, options)], zeros(), context())
    assert all(not array.any() for array in result.arrays.values())


@pytest.mark.parametrize(("kind", "options"), [case for case in EVERY if case[0] not in TOGETHER], ids=str)
def test_values_are_those_of_the_oracle(kind: str, options: dict[str, Any]) -> None:
    update = drawn()
    given, result = wide(update), wide(passed([built(kind, options)], update, context()))
    for name in SHAPES:
        CHECKS[kind](given[name], result[name], options)


def test_clip_scales_to_the_norm() -> None:
    update = drawn()
    norm = math.sqrt(sum(float(np.sum(a**2)) for a in wide(update).values()))
    assert norm > 0.01
    clipped = passed([built("clip", {"clip_norm": 0.01})], update, context())
    for name, array in wide(update).items():
        assert np.allclose(clipped.arrays[name], array * 0.01 / norm, rtol=1e-6)
    untouched = passed([built("clip", {"clip_norm": 100.0})], update, context())
    assert arrays_digest(untouched.arrays) == arrays_digest(update.arrays)


@pytest.mark.parametrize("options", [{"density": 0.1}, {"density": 0.3, "alpha": 2.0}], ids=str)
def test_compeft_cuts_the_whole_update_at_once(options: dict[str, Any]) -> None:
    update = drawn()
    x = np.concatenate([wide(update)[name].ravel() for name in sorted(SHAPES)])
    came = wide(passed([built("compeft", options)], update, context()))
    wanted, scale = np.zeros(x.size), options.get("alpha", 1.0) * x.std()
    for i in largest(x, options["density"]):
        wanted[i] = math.copysign(scale, x[i])
    assert np.allclose(np.concatenate([came[name].ravel() for name in sorted(SHAPES)]), wanted, rtol=1e-5)
    shares = {
        name: np.count_nonzero(came[name]) / came[name].size for name in ("layer.0.lora_A", "layer.1.bias")
    }
    assert shares["layer.0.lora_A"] < options["density"] < shares["layer.1.bias"]


def test_compeft_leaves_out_what_never_moved() -> None:
    update = Update({"a": np.array([3, -4, 0, 1], np.float32), "frozen": np.zeros(1000, np.float32)})
    came = passed([built("compeft", {"density": 0.5})], update, context())
    scale = np.std(update.arrays["a"])
    assert np.allclose(came.arrays["a"], scale * np.array([1, -1, 0, 0]))
    assert not came.arrays["frozen"].any()


@lossy
def test_distortion_is_measured_on_the_client(kind: str, options: dict[str, Any]) -> None:
    stages, update = [built(kind, options)], drawn()
    result = passed(stages, update, context())
    x = np.concatenate([a.ravel() for a in wide(update).values()])
    y = np.concatenate([a.ravel() for a in wide(result).values()])
    assert result.metrics["distortion"] == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x))
    assert result.metrics["cosine"] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


@fed_back
def test_error_feedback_loses_nothing(kind: str, options: dict[str, Any]) -> None:
    """What was sent and what is still kept add up to all updates; the kept part doesn't grow."""
    memory: dict[str, Any] = {}
    stages, total, given, norms = [built(kind, options)], zeros(), zeros(), []
    for round_ in range(1, 61):
        update = drawn(round_) + drawn(1000)
        at = context(round_, memory=memory)
        total, given = total + passed(stages, update, at), given + update
        norms.append(math.sqrt(sum(float(np.sum(np.square(a))) for a in memory.values())))
    assert {key.removeprefix("residual/") for key in memory} == {n for n, s in SHAPES.items() if math.prod(s)}
    for name, array in given.arrays.items():
        rest = memory.get(f"residual/{name}", 0)
        assert np.allclose(total.arrays[name] + rest, array, atol=1e-4)
    assert max(norms[30:]) < 1.5 * max(norms[:30]) + 1e-6


@lossy
def test_touching_no_tensor_is_an_error(kind: str, options: dict[str, Any]) -> None:
    stage = built(kind, options | {"tensors": ("layer.9.*",)})
    with pytest.raises(UpdateError, match="matches none"):
        stage.on_client(drawn(), context())


@lossy
def test_what_the_patterns_leave_out_travels_whole(kind: str, options: dict[str, Any]) -> None:
    update = drawn()
    result = passed([built(kind, options | {"tensors": ("*.lora_?",)})], update, context())
    for name in SHAPES:
        if "lora" not in name:
            assert np.array_equal(result.arrays[name], update.arrays[name])


@lossy
def test_integers_and_numbers_that_are_not_finite_are_refused(kind: str, options: dict[str, Any]) -> None:
    stage = built(kind, options)
    with pytest.raises(UpdateError, match="int64"):
        stage.on_client(Update({"a": np.ones(3, np.int64)}), context())
    with pytest.raises(UpdateError, match="NaN or infinity"):
        stage.on_client(Update({"a": np.array([1, np.nan], np.float32)}), context())


@lossy
def test_the_server_refuses_what_another_stage_sends(kind: str, options: dict[str, Any]) -> None:
    """Whatever compressed form comes under this stage's promise, it is this stage's own or it is refused.

    Signs and scales of the two ternary stages can agree, so these two are told apart in a test of their own.
    """
    stage, update = built(kind, options), drawn()
    with pytest.raises(UpdateError, match="ward-7"):
        stage.on_server(update, context())
    for other, others in LOSSY:
        foreign = on_client([built(other, others)], update, context())
        if other != kind and {kind, other} != {"compeft", "ternary"}:
            with pytest.raises(UpdateError, match=r"ward-7: array .* breaks stage"):
                stage.on_server(foreign, context())
            if STAGES[other].payload != STAGES[kind].payload:
                with pytest.raises(UpdateError, match=f"this run's stages send {derive_payload([stage])}"):
                    received([stage], sent([built(other, others)], update, context()), update, context())


def test_compeft_and_ternary_refuse_each_others_scales_and_counts() -> None:
    update, compeft, ternary = drawn(), built("compeft", {}), built("ternary", {})
    with pytest.raises(UpdateError, match=r"ward-7: array .* breaks stage 'compeft': scale .* have one"):
        received([compeft], sent([ternary], update, context()), update, context())
    with pytest.raises(UpdateError, match=r"ward-7: array .* breaks stage 'ternary': \d+ signs came"):
        received([ternary], sent([compeft], update, context()), update, context())


@pytest.mark.parametrize(
    ("kind", "lax", "strict"),
    [
        ("compeft", {"density": 0.3}, {"density": 0.1}),
        ("ternary", {"density": 0.3}, {"density": 0.1}),
        ("ternary", {"scale": "fixed", "value": 9.0}, {"scale": "fixed", "value": 0.5}),
        ("top-k", {"density": 0.3}, {"density": 0.1}),
        ("random-k", {"density": 0.3}, {"density": 0.1}),
        ("random-k", {"error_feedback": False}, {"error_feedback": True}),
        ("dare", {"drop_rate": 0.3}, {"drop_rate": 0.9}),
        ("quantise", {"bits": 8}, {"bits": 4}),
    ],
)
def test_the_server_refuses_other_options(kind: str, lax: dict[str, Any], strict: dict[str, Any]) -> None:
    update = drawn()
    with pytest.raises(UpdateError, match=f"ward-7: array .* breaks stage '{kind}'"):
        received([built(kind, strict)], sent([built(kind, lax)], update, context()), update, context())


@pytest.mark.parametrize("kind", ["random-k", "dare"])
def test_a_client_can_not_choose_its_positions(kind: str) -> None:
    stages, update = [built(kind, {})], drawn()
    for other in (context(client="ward-8"), context(round_=4)):
        with pytest.raises(UpdateError, match="positions"):
            received(stages, sent(stages, update, other), update, context())
