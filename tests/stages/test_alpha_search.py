"""ComPEFT's alpha, searched on held-out rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedpeft.codec.ternary import ALPHA_GRID
from fedpeft.config.run_file import build_run
from fedpeft.config.sections import RunConfig
from fedpeft.errors import RunFileError, UpdateError
from fedpeft.ledger.records import Round
from fedpeft.planning.preflight import refuse_problems
from fedpeft.stages import build_downlink
from fedpeft.updates.update import Arrays, Update
from tests.simulation.conftest import tiny_tables
from tests.simulation.runs import simulated
from tests.stages.passing import built, context, drawn, passed, wide

SEARCHED = {"density": 0.1, "alpha": "search"}


def brute(update: Update, alpha: float) -> dict[str, np.ndarray]:
    """Signs of the largest tenth of all entries times alpha times their standard deviation, in float64."""
    arrays = wide(update)
    names = sorted(arrays)
    flat = np.concatenate([arrays[name].ravel() for name in names])
    signs = np.zeros(flat.size)
    kept = np.argsort(-np.abs(flat), kind="stable")[: round(0.1 * flat.size)]
    signs[kept] = alpha * flat.std() * np.sign(flat[kept])
    parts = np.split(signs, np.cumsum([arrays[name].size for name in names])[:-1])
    return {name: part.reshape(arrays[name].shape) for name, part in zip(names, parts, strict=True)}


def distance_to(target: Arrays) -> Callable[[Arrays], float]:
    return lambda arrays: sum(float(np.sum((arrays[name] - target[name]) ** 2)) for name in target)


@pytest.mark.parametrize("alpha", ALPHA_GRID)
def test_the_alpha_with_the_lowest_loss_is_sent(alpha: float) -> None:
    update = drawn()
    target = brute(update, 1.05 * alpha)
    came = passed([built("compeft", SEARCHED)], update, context(held_out_loss=distance_to(target)))
    losses = {guess: distance_to(target)(brute(update, guess)) for guess in ALPHA_GRID}
    best = min(losses, key=lambda guess: losses[guess])
    assert best == alpha
    assert came.metrics["alpha"] == best
    for name, array in brute(update, best).items():
        np.testing.assert_allclose(wide(came)[name], array, rtol=1e-5, atol=1e-9)
    x = np.concatenate([array.ravel() for array in wide(update).values()])
    y = np.concatenate([array.ravel() for array in wide(came).values()])
    assert came.metrics["distortion"] == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x))
    assert came.metrics["cosine"] == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def test_of_equal_ones_the_smallest_and_broken_losses_are_passed_over() -> None:
    stage, update = built("compeft", SEARCHED), drawn()
    flat = passed([stage], update, context(held_out_loss=lambda arrays: 1.0))
    assert flat.metrics["alpha"] == min(ALPHA_GRID)
    bound = 3.5 * np.concatenate([array.ravel() for array in wide(update).values()]).std()

    def loss(arrays: Arrays) -> float:
        largest = max(float(np.abs(array).max()) for array in arrays.values() if array.size)
        return math.nan if largest < bound else 1.0

    assert passed([stage], update, context(held_out_loss=loss)).metrics["alpha"] == 4.0
    with pytest.raises(UpdateError, match="ward-7: no alpha of 9 has a held-out loss that is a number"):
        stage.on_client(update, context(held_out_loss=lambda arrays: math.inf))


def test_without_held_out_rows_it_is_refused() -> None:
    with pytest.raises(UpdateError, match="ward-7: alpha = 'search' needs held-out rows and there are none"):
        built("compeft", SEARCHED).on_client(drawn(), context())


def run(stage: dict[str, Any], **more: Any) -> RunConfig:
    return build_run({"run": {"name": "x", "rounds": 1}, "stages": [stage], **more}, source="x")


@pytest.mark.parametrize(
    ("options", "more", "needle"),
    [
        ({}, {"data": {"heldout": 0.0}}, "needs held-out rows; set data.heldout above 0"),
        ({"error_feedback": True}, {}, "may overshoot"),
        ({"alpha": "best"}, {}, "a number above 0, or 'search', is needed"),
        ({"alpha": 0.0}, {}, "a number above 0, or 'search', is needed"),
        (
            {},
            {
                "privacy": {
                    "kind": "local",
                    "clip_norm": 1.0,
                    "noise_multiplier": 1.0,
                    "target_delta": 1e-5,
                    "max_epsilon": 9.0,
                }
            },
            "asks the client's rows again",
        ),
    ],
)
def test_a_search_that_makes_no_sense_is_refused_with_the_run_file(
    options: dict[str, Any], more: dict[str, Any], needle: str
) -> None:
    with pytest.raises(RunFileError, match=rf"stages\.0.*{needle}"):
        refuse_problems(run({"kind": "compeft", **SEARCHED, **options}, **more), source="test")


def test_a_search_has_no_rows_on_the_way_down() -> None:
    searching = run({"kind": "identity"}, downlink={"kind": "compeft", **SEARCHED})
    with pytest.raises(
        RunFileError, match=r"downlink \(compeft\): alpha = 'search' needs a client's held-out"
    ):
        build_downlink(searching)


def test_a_run_searches_on_each_clients_own_rows(tmp_path: Any) -> None:
    """A run of two rounds, with alphas of the grid and the distortion that they make."""
    tables = tiny_tables() | {"stages": [{"kind": "compeft", **SEARCHED}]}
    tables["run"]["rounds"] = 2
    simulated(tables, tmp_path / "run")
    rows = [
        Round.model_validate_json(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if '"event":"round"' in line and '"round":0' not in line
    ]
    assert len(rows) == 2
    for row in rows:
        assert [outcome.status for outcome in row.outcomes] == ["folded"] * 4
        assert all(outcome.distortion is not None and outcome.distortion > 0 for outcome in row.outcomes)
