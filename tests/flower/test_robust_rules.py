"""Robust rules as the round loop calls them: Flower's on entries, and both kinds on LoRA's products."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpeft.config.run_file import build_run
from fedpeft.errors import RunFileError
from fedpeft.rounds.strategies import StrategyRunner
from fedpeft.rounds.strategy_table import RULES, geometry_problems, strategy_problems
from fedpeft.updates.update import Arrays, Update, layout_of

CLIENTS, RANK, M, N = 7, 2, 6, 9
A, B, HEAD = "x.lora_A.weight", "x.lora_B.weight", "head"
ROBUST = sorted(name for name, rule in RULES.items() if rule.robust)
OPTIONS: dict[str, dict[str, Any]] = {
    "krum": {"num_malicious_nodes": 1},
    "multikrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 4},
    "bulyan": {"num_malicious_nodes": 1},
    "fedtrimmedavg": {"beta": 0.2},
}


def state_of() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return {
        A: rng.normal(size=(RANK, N)).astype(np.float32),
        B: rng.normal(size=(M, RANK)).astype(np.float32),
        HEAD: rng.normal(size=(3,)).astype(np.float32),
    }


def updates_of(state: Arrays, hostile: int = 1) -> list[Update]:
    """Small honest changes around a common one, and hostile ones that are large."""
    rng = np.random.default_rng(1)
    common = {name: rng.normal(size=array.shape) for name, array in state.items()}
    found = []
    for place in range(CLIENTS):
        size = 30.0 if place < hostile else 0.1
        arrays = {
            name: (0.1 * common[name] + 0.1 * size * rng.normal(size=array.shape)).astype(np.float32)
            for name, array in state.items()
        }
        found.append(Update(arrays, int(rng.integers(1, 9))))
    return found


def runner(kind: str, state: Arrays, **strategy: Any) -> StrategyRunner:
    tables = {
        "run": {"name": "t", "rounds": 1},
        "peft": {"method": "lora", "r": RANK, "lora_alpha": RANK},
        "federation": {"strategy": {"kind": kind, **OPTIONS.get(kind, {}), **strategy}},
    }
    made = StrategyRunner(build_run(tables, source="test"), layout_of(state), CLIENTS)
    made.start_from(state)
    return made


def closed(made: StrategyRunner, updates: list[Update]) -> dict[str, NDArray[np.float64]]:
    aggregator = made.begin(1, capacity=len(updates))
    for place in np.random.default_rng(2).permutation(len(updates)):
        aggregator.fold(f"client-{place}", updates[place])
    return {name: np.asarray(array, dtype=np.float64) for name, array in aggregator.close().items()}


def effect(state: Arrays, change: Arrays) -> NDArray[np.float64]:
    """What the model's weights become, as one vector."""
    wide = {name: state[name].astype(np.float64) + change[name] for name in state}
    return np.concatenate([(wide[B] @ wide[A]).ravel(), wide[HEAD]])


def moves(state: Arrays, updates: list[Update]) -> NDArray[np.float64]:
    """Changes of the weights, [clients, entries]."""
    start = effect(state, {name: np.zeros_like(array) for name, array in state.items()})
    return np.stack([effect(state, update.arrays) - start for update in updates])


def turned(state: Arrays, updates: list[Update]) -> list[Update]:
    """Every client's products from factors of its own choosing."""
    rng = np.random.default_rng(3)
    found = []
    for update in updates:
        g = rng.normal(size=(RANK, RANK)) + 2.0 * np.eye(RANK)
        a, b = (state[name].astype(np.float64) + update.arrays[name] for name in (A, B))
        arrays = {A: g @ a - state[A], B: b @ np.linalg.inv(g) - state[B], HEAD: update.arrays[HEAD]}
        found.append(Update({k: v.astype(np.float32) for k, v in arrays.items()}, update.weight))
    return found


@pytest.mark.parametrize("kind", ROBUST)
def test_no_rule_on_products_depends_on_the_choice_of_factors(kind: str) -> None:
    state = state_of()
    updates = updates_of(state)
    made = runner(kind, state, geometry="product")
    assert made.geometry == "product"
    expected, came = closed(made, updates), closed(made, turned(state, updates))
    np.testing.assert_allclose(effect(state, came), effect(state, expected), atol=2e-4)
    entries = runner(kind, state, geometry="entries")
    assert entries.geometry == "entries"
    spoilt = effect(state, closed(entries, turned(state, updates)))
    assert np.abs(spoilt - effect(state, closed(entries, updates))).max() > 0.05  # the test can fail


def test_products_are_the_default_of_rules_that_measure_distances() -> None:
    state = state_of()
    found = {kind: runner(kind, state).geometry for kind in ROBUST}
    per_entry = {"fedmedian", "fedtrimmedavg", "bulyan"}
    assert found == {kind: "entries" if kind in per_entry else "product" for kind in ROBUST}


@pytest.mark.parametrize("geometry", ["entries", "product"])
@pytest.mark.parametrize("kind", ROBUST)
def test_one_large_update_moves_no_robust_rule_far(kind: str, geometry: str) -> None:
    state = state_of()
    updates = updates_of(state)
    honest = moves(state, updates)[1:]
    start = effect(state, {name: np.zeros_like(array) for name, array in state.items()})
    came = effect(state, closed(runner(kind, state, geometry=geometry), updates)) - start
    middle, spread = honest.mean(axis=0), np.linalg.norm(honest - honest.mean(axis=0), axis=1).max()
    assert np.linalg.norm(came - middle) < 2.5 * spread + 0.25 * np.linalg.norm(middle)
    plain = effect(state, closed(runner("fedavg", state), updates)) - start
    assert np.linalg.norm(plain - middle) > 10 * spread  # the update is large enough to be felt


def test_krum_on_products_takes_the_nearest_model() -> None:
    state = state_of()
    updates = updates_of(state)
    dense = moves(state, updates)
    squares = np.sum((dense[:, None] - dense[None]) ** 2, axis=2)
    scores = np.sort(squares, axis=1)[:, 1 : 1 + CLIENTS - 1 - 2].sum(axis=1)
    start = effect(state, {name: np.zeros_like(array) for name, array in state.items()})
    came = effect(state, closed(runner("krum", state), updates))
    np.testing.assert_allclose(came, start + dense[np.argmin(scores)], atol=1e-5)


def test_norm_bound_on_entries_is_the_mean_of_cut_updates() -> None:
    state = state_of()
    updates = updates_of(state)
    flat = np.stack([np.concatenate([u.arrays[n].ravel() for n in sorted(state)]) for u in updates]).astype(
        float
    )
    norms, weights = np.linalg.norm(flat, axis=1), np.array([update.weight for update in updates])
    bounded = flat * np.minimum(1.0, 0.7 / norms)[:, None]
    expected = weights @ bounded / weights.sum()
    came = closed(runner("norm-bound", state, geometry="entries", clip_norm=0.7), updates)
    np.testing.assert_allclose(np.concatenate([came[n].ravel() for n in sorted(state)]), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["krum", "multikrum"])
def test_ours_on_entries_choose_as_flower_s(kind: str) -> None:
    """Two implementations of one definition: the arrays have no pairs, so 'entries' is Flower's."""
    from fedpeft.aggregation.robust import Entries

    state = {HEAD: np.zeros(20, dtype=np.float32)}
    for seed in range(5):
        rng = np.random.default_rng(seed)
        updates = [
            Update({HEAD: rng.normal(size=20).astype(np.float32)}, int(rng.integers(1, 9))) for _ in range(7)
        ]
        arrays = [update.arrays for update in updates]
        weights = np.array([update.weight for update in updates], dtype=np.float64)
        rule = RULES[kind].coefficients
        assert rule is not None
        ours = rule(Entries().gram(arrays), weights / weights.sum(), **OPTIONS[kind])
        flowers = closed(runner(kind, state), updates)
        np.testing.assert_allclose(Entries().combine(arrays, ours)[HEAD], flowers[HEAD], rtol=1e-5, atol=1e-6)


def test_bulyan_leaves_the_collector_as_it_was() -> None:
    """Objects that are there before are kept out of Flower's collections, and no longer than that."""
    before = gc.get_freeze_count()
    state = state_of()
    closed(runner("bulyan", state), updates_of(state))
    assert gc.get_freeze_count() == before


def test_a_geometry_where_there_is_none_is_refused() -> None:
    def problems(strategy: dict[str, Any], **tables: Any) -> list[str]:
        run = build_run(
            {"run": {"name": "t", "rounds": 1}, "federation": {"strategy": strategy}, **tables}, source="t"
        )
        return strategy_problems(run.federation.strategy, 20) + geometry_problems(run)

    product = {"kind": "fedmedian", "geometry": "product"}
    assert problems(product) == []
    assert "compares no updates" in problems({"kind": "fedavg", "geometry": "product"})[0]
    assert "both of LoRA's factors" in problems(product, peft={"method": "ffa-lora"})[0]
    assert "both of LoRA's factors" in problems(product, space="projected")[0]
    assert "above 0" in problems({"kind": "norm-bound", "clip_norm": 0.0})[0]
    assert "no such option; it takes clip_norm, multiple" in problems({"kind": "norm-bound", "bound": 1.0})[0]
    with pytest.raises(RunFileError, match="no two factors"):
        runner("krum", {HEAD: np.zeros(3, dtype=np.float32)}, geometry="product")
