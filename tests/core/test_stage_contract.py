"""What every stage promises, and what each single one computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config.option_tables import build_option
from fedpeft.config.run_file import build_run
from fedpeft.errors import RunFileError, UpdateError
from fedpeft.stages import STAGES, Stage, StageContext, build_stages, on_client, on_server
from fedpeft.stages.clip import Clip
from fedpeft.stages.weigh import MAX_EXAMPLES, Weigh
from fedpeft.updates.update import Update, arrays_digest, layout_of
from tests.core.strategies import FLOAT, several

# Options with which each stage is put through the contract; a new stage adds its line.
OPTIONS: dict[str, dict[str, Any]] = {
    "clip": {"clip_norm": 1.0},
    "compeft": {},
    "ternary": {},
    "dare": {},
    "identity": {},
    "quantise": {},
    "random-k": {},
    "sign": {},
    "top-k": {},
    "weigh": {},
}


def context(seed: int = 0) -> StageContext:
    return StageContext(seed=seed, round=1, client="a")


def make(name: str) -> Stage:
    stage: Stage = build_option("stages.0", STAGES, name, OPTIONS[name])
    return stage


def normal(*shapes: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> Update:
    rng = np.random.default_rng(seed)
    arrays = {f"p{i}": (scale * rng.standard_normal(s)).astype(np.float32) for i, s in enumerate(shapes)}
    return Update(arrays, weight=7, metrics={"loss": 0.5})


UPDATE = normal((4, 3), (5,), ())


def test_every_stage_is_under_the_contract() -> None:
    assert set(OPTIONS) == set(STAGES)
    assert len(STAGES) == 10


@pytest.mark.parametrize("name", sorted(OPTIONS))
class TestContract:
    def test_hooks_do_not_change_their_argument(self, name: str) -> None:
        before = arrays_digest(UPDATE.arrays)
        sent = make(name).on_client(UPDATE, context())
        on_the_wire = arrays_digest(sent.arrays)
        make(name).on_server(sent, context())
        assert arrays_digest(UPDATE.arrays) == before
        assert arrays_digest(sent.arrays) == on_the_wire

    def test_the_server_sees_the_layout_that_the_client_had(self, name: str) -> None:
        stage = make(name)
        came = stage.on_server(stage.on_client(UPDATE, context()), context())
        assert layout_of(came.arrays) == layout_of(UPDATE.arrays)
        assert came.weight >= 1
        assert came.is_finite()

    def test_equal_streams_give_equal_bits(self, name: str) -> None:
        stage = make(name)
        once, twice = (stage.on_server(stage.on_client(UPDATE, context(3)), context(3)) for _ in range(2))
        assert arrays_digest(once.arrays) == arrays_digest(twice.arrays)

    def test_a_zero_update_stays_zero(self, name: str) -> None:
        zero = UPDATE.scale(0.0)
        stage = make(name)
        came = stage.on_server(stage.on_client(zero, context()), context())
        assert came.global_norm() == 0.0

    def test_an_empty_array_is_no_obstacle(self, name: str) -> None:
        update = normal((0, 3), (2,))
        stage = make(name)
        came = stage.on_server(stage.on_client(update, context()), context())
        assert layout_of(came.arrays) == layout_of(update.arrays)

    def test_unknown_options_are_refused(self, name: str) -> None:
        with pytest.raises(RunFileError, match="no_such_option"):
            build_option("stages.0", STAGES, name, {**OPTIONS[name], "no_such_option": 1})


@given(several(1, 1, st.just(FLOAT)), st.floats(1e-3, 1e3))
def test_clipping_is_a_projection_on_the_ball(case: tuple[object, list[Update]], clip_norm: float) -> None:
    (update,) = case[1]
    flat = np.concatenate([a.ravel() for a in update.arrays.values()]).astype(np.float64)
    norm = float(np.sqrt(flat @ flat))
    expected = flat if norm <= clip_norm else flat * (clip_norm / norm)
    came = Clip(clip_norm=clip_norm).on_client(update, context())
    result = np.concatenate([a.ravel() for a in came.arrays.values()]).astype(np.float64)
    assert np.allclose(result, expected, rtol=1e-6, atol=1e-37)
    assert np.sqrt(result @ result) <= clip_norm * (1 + 1e-6)
    assert came.weight == update.weight


def test_the_server_clips_a_client_that_did_not() -> None:
    stage = Clip(clip_norm=0.5)
    assert stage.on_server(normal((50,)), context()).global_norm() == pytest.approx(0.5, rel=1e-6)
    honest = stage.on_client(normal((50,)), context())
    assert arrays_digest(stage.on_server(honest, context()).arrays) == arrays_digest(honest.arrays)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_server_refuses_what_is_not_finite(bad: float) -> None:
    with pytest.raises(UpdateError, match="finite"):
        Clip(clip_norm=1.0).on_server(Update({"a": np.array([bad], np.float32)}), context())


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0}, {"clip_norm": -1}, {"clip_norm": float("inf")}])
def test_a_clip_norm_is_positive_and_finite(options: dict[str, Any]) -> None:
    with pytest.raises(RunFileError, match="clip_norm"):
        build_option("stages.0", STAGES, "clip", options)


def test_weights_by_examples_and_uniform() -> None:
    by_examples, uniform = Weigh(by="examples"), Weigh(by="uniform")
    assert by_examples.on_client(UPDATE, context()).weight == 7
    assert uniform.on_client(UPDATE, context()).weight == 1
    liar = Update(UPDATE.arrays, weight=10**6)
    assert uniform.on_server(liar, context()).weight == 1
    assert by_examples.on_server(liar, context()).weight == 10**6
    for weight in (0, -3, MAX_EXAMPLES + 1, 2**64 - 1):
        with pytest.raises(UpdateError, match=f"weight {weight} came"):
            by_examples.on_server(Update(UPDATE.arrays, weight=weight), context())


def test_a_stage_has_the_same_stream_on_client_and_server_and_shares_it_with_none() -> None:
    def draws(seed: int, round_: int, client: str, stage: str) -> bytes:
        return StageContext(seed=seed, round=round_, client=client).rng(stage).bytes(16)

    assert draws(1, 2, "a", "x") == draws(1, 2, "a", "x")
    names = [(1, 2, "a", "x"), (0, 2, "a", "x"), (1, 3, "a", "x"), (1, 2, "b", "x"), (1, 2, "a", "y")]
    assert len({draws(*name) for name in names}) == 5


class Noted:
    """A stage that notes when it ran."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self._name, self._notes = name, notes

    def on_client(self, update: Update, context: StageContext) -> Update:
        self._notes.append(f"client {self._name}")
        return update

    def on_server(self, update: Update, context: StageContext) -> Update:
        self._notes.append(f"server {self._name}")
        return update


def test_stages_are_an_onion() -> None:
    notes: list[str] = []
    stages: Any = (Noted("one", notes), Noted("two", notes))
    on_server(stages, on_client(stages, UPDATE, context()), context())
    assert notes == ["client one", "client two", "server two", "server one"]


def test_a_run_weighs_first_and_names_wrong_stages() -> None:
    table = {
        "run": {"name": "x", "rounds": 1},
        "data": {"partitioner": {"kind": "iid", "clients": 2}},
        "federation": {"weighting": "uniform"},
        "stages": [{"kind": "clip", "clip_norm": 2.0}],
    }
    assert build_stages(build_run(table, source="x")) == (Weigh(by="uniform"), Clip(clip_norm=2.0))
    with pytest.raises(RunFileError, match=r"stages\.0: unknown kind 'clop'.*'clip'"):
        build_stages(build_run({**table, "stages": [{"kind": "clop"}]}, source="x"))
