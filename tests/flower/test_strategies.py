"""Flower's strategies through our zero-anchored calls, against arithmetic written out here."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpeft.config.run_file import build_run
from fedpeft.errors import FederationError, RunFileError, UpdateError
from fedpeft.rounds.strategies import StrategyRunner
from fedpeft.rounds.strategy_table import RULES, strategy_problems
from fedpeft.updates.update import Layout, Update, layout_of

Vector = NDArray[np.float64]
CLIENTS = 7


def runner(kind: str, layout: Layout, clients: int = CLIENTS, **options: float) -> StrategyRunner:
    if kind == "qfedavg":
        options = {"client_learning_rate": 0.1} | options
    tables = {"run": {"name": "t", "rounds": 1}, "federation": {"strategy": {"kind": kind} | options}}
    return StrategyRunner(build_run(tables, source="test"), layout, clients)


def updates(seed: int, count: int = CLIENTS) -> list[Update]:
    """Deltas of two arrays (one of them a scalar) with different weights and losses."""
    rng = np.random.default_rng(seed)
    return [
        Update(
            {"a": rng.normal(size=(3, 2)).astype(np.float32), "b": rng.normal(size=()).astype(np.float32)},
            int(rng.integers(1, 50)),
            {"loss": float(rng.random() + 0.5)},
        )
        for _ in range(count)
    ]


def flat(arrays: Mapping[str, NDArray[Any]]) -> Vector:
    return np.concatenate([np.asarray(arrays[name], dtype=np.float64).ravel() for name in sorted(arrays)])


def aggregate(run: StrategyRunner, given: Sequence[Update], round_: int = 1) -> Vector:
    aggregator = run.begin(round_, capacity=len(given))
    for index, update in enumerate(given):
        aggregator.fold(f"client-{index}", update)
    return flat(aggregator.close())


def mean(given: Sequence[Update]) -> Vector:
    total = sum(update.weight for update in given)
    result: Vector = sum((flat(u.arrays) * u.weight for u in given), np.zeros(7)) / total
    return result


def median(given: Sequence[Update]) -> Vector:
    result: Vector = np.median([flat(u.arrays) for u in given], axis=0)
    return result


def trimmed(given: Sequence[Update]) -> Vector:
    ordered = np.sort([flat(u.arrays) for u in given], axis=0)
    cut = int(0.2 * len(given))
    result: Vector = ordered[cut : len(given) - cut].mean(axis=0)
    return result


def krum_order(given: Sequence[Update], malicious: int) -> list[int]:
    """Indices by Krum score: sum of the n - f - 2 nearest squared distances (Blanchard et al. 2017)."""
    vectors = [flat(u.arrays) for u in given]
    scores = []
    for vector in vectors:
        distances = sorted(float(np.sum((vector - other) ** 2)) for other in vectors)
        scores.append(
            sum(distances[1 : len(vectors) - malicious - 1])
        )  # the first one is the distance to itself
    return sorted(range(len(given)), key=lambda index: scores[index])


def krum(given: Sequence[Update]) -> Vector:
    return flat(given[krum_order(given, 1)[0]].arrays)


def adam_family(given: Sequence[Update], second: Callable[[Vector], Vector]) -> Vector:
    """One first step of Reddi et al. 2021, algorithm 2, with moments from zero."""
    delta = mean(given)
    return 0.1 * (1 - 0.9) * delta / (np.sqrt(second(delta)) + 1e-3)


ORACLES: dict[str, tuple[dict[str, Any], Callable[[Sequence[Update]], Vector]]] = {
    "fedavg": ({}, mean),
    "fedprox": ({"proximal_mu": 0.1}, mean),
    "fedavgm": ({"server_momentum": 0.9, "server_learning_rate": 0.5}, lambda given: 0.5 * mean(given)),
    "fedadagrad": ({"eta": 0.1, "tau": 1e-3}, lambda given: 0.1 * mean(given) / (np.abs(mean(given)) + 1e-3)),
    "fedyogi": (
        {"eta": 0.1, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3},
        lambda given: adam_family(given, lambda delta: 0.01 * delta**2),
    ),
    "fedmedian": ({}, median),
    "fedtrimmedavg": ({"beta": 0.2}, trimmed),
    "krum": ({"num_malicious_nodes": 1}, krum),
}


@pytest.mark.parametrize("kind", sorted(ORACLES))
def test_strategy_equals_its_definition(kind: str) -> None:
    options, oracle = ORACLES[kind]
    given = updates(3)
    came = aggregate(runner(kind, layout_of(given[0].arrays), **options), given)
    np.testing.assert_allclose(came, oracle(given), rtol=2e-6, atol=1e-7)


def test_adam_follows_two_rounds_of_its_definition() -> None:
    """Flower's FedAdam corrects the bias of both moments in the step size (Kingma & Ba 2015, section 2)."""
    rounds = [updates(1), updates(2)]
    run = runner("fedadam", layout_of(rounds[0][0].arrays), eta=0.1, beta_1=0.9, beta_2=0.99, tau=1e-3)
    first, second = np.zeros(7), np.zeros(7)
    for number, given in enumerate(rounds, start=1):
        delta = mean(given)
        first, second = 0.9 * first + 0.1 * delta, 0.99 * second + 0.01 * delta**2
        step = 0.1 * np.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1))
        expected = step * first / (np.sqrt(second) + 1e-3)
        np.testing.assert_allclose(aggregate(run, given, number), expected, rtol=2e-6)


def test_momentum_accumulates_over_rounds() -> None:
    rounds = [updates(1), updates(2), updates(3)]
    run = runner("fedavgm", layout_of(rounds[0][0].arrays), server_momentum=0.5, server_learning_rate=1.0)
    velocity = np.zeros(7)
    for number, given in enumerate(rounds, start=1):
        velocity = 0.5 * velocity + mean(given)
        np.testing.assert_allclose(aggregate(run, given, number), velocity, rtol=2e-6)


@pytest.mark.parametrize("kind", sorted(RULES))
def test_every_rule_agrees_when_all_clients_do(kind: str) -> None:
    """Identical updates: mean, median and selections are that update; adaptive rules keep its signs."""
    one = updates(5, 1)[0]
    given = [one] * CLIENTS
    came = aggregate(runner(kind, layout_of(one.arrays)), given)
    assert np.isfinite(came).all()
    if kind in ("fedadam", "fedyogi", "fedadagrad"):
        np.testing.assert_array_equal(np.sign(came), np.sign(flat(one.arrays)))
    elif kind == "qfedavg":  # divides by the Lipschitz estimate, which depends on the losses
        cosine = came @ flat(one.arrays) / np.linalg.norm(came) / np.linalg.norm(flat(one.arrays))
        assert cosine == pytest.approx(1.0, abs=1e-6)
    else:
        np.testing.assert_allclose(came, flat(one.arrays), rtol=2e-6)


@pytest.mark.parametrize("kind", sorted(RULES))
def test_arrival_order_does_not_matter(kind: str) -> None:
    given = dict(enumerate(updates(7, 5)))
    results = []
    for order in itertools.islice(itertools.permutations(given), 0, 120, 17):
        aggregator = runner(kind, layout_of(given[0].arrays), 5).begin(1, capacity=5)
        for index in order:
            aggregator.fold(f"client-{index}", given[index])
        results.append(flat(aggregator.close()))
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


@pytest.mark.parametrize("kind", sorted(kind for kind, rule in RULES.items() if rule.memory))
def test_memory_survives_a_restart(kind: str) -> None:
    rounds = [updates(1), updates(2)]
    layout = layout_of(rounds[0][0].arrays)
    options: dict[str, Any] = {"server_momentum": 0.9} if kind == "fedavgm" else {}
    steady, first = runner(kind, layout, **options), runner(kind, layout, **options)
    aggregate(steady, rounds[0], 1)
    aggregate(first, rounds[0], 1)
    second = runner(kind, layout, **options)
    second.restore(first.memory())
    assert first.memory(), "a rule with a memory remembers something after a round"
    np.testing.assert_array_equal(aggregate(second, rounds[1], 2), aggregate(steady, rounds[1], 2))


@pytest.mark.parametrize("kind", sorted(RULES))
def test_a_poisoned_update_is_refused_and_the_rest_counts(kind: str) -> None:
    given = updates(9)
    layout = layout_of(given[0].arrays)
    aggregator = runner(kind, layout).begin(1, capacity=CLIENTS + 1)
    poison = Update(
        {"a": np.full((3, 2), np.nan, np.float32), "b": np.zeros((), np.float32)}, 3, {"loss": 1.0}
    )
    with pytest.raises(UpdateError, match="mallory: array 'a' holds NaN or infinity"):
        aggregator.fold("mallory", poison)
    for index, update in enumerate(given):
        aggregator.fold(f"client-{index}", update)
    np.testing.assert_array_equal(flat(aggregator.close()), aggregate(runner(kind, layout), given))


def test_updates_survive_rules_that_empty_what_they_are_given() -> None:
    given = updates(2)
    before = [flat(update.arrays) for update in given]
    for kind in ("fedmedian", "fedtrimmedavg", "bulyan", "qfedavg"):
        aggregate(runner(kind, layout_of(given[0].arrays)), given)
    for update, values in zip(given, before, strict=True):
        np.testing.assert_array_equal(flat(update.arrays), values)


def test_too_few_updates_for_a_robust_rule() -> None:
    given = updates(1, 4)
    run = runner("krum", layout_of(given[0].arrays), num_malicious_nodes=1)
    with pytest.raises(FederationError, match="krum needs 5 updates and 4 came"):
        aggregate(run, given)


def test_options_are_checked_by_name_and_type() -> None:
    tables: dict[str, Any] = {"run": {"name": "t", "rounds": 1}}

    def problems(**strategy: Any) -> list[str]:
        run = build_run(tables | {"federation": {"strategy": strategy}}, source="test")
        return strategy_problems(run.federation.strategy, 4)

    assert problems(kind="fedavg") == []
    assert "etta" in problems(kind="fedadam", etta=1.0)[0]
    assert "eta, eta_l" in problems(kind="fedadam", etta=1.0)[0].replace("beta_1, beta_2, ", "")
    assert "client_learning_rate: qfedavg needs it" in problems(kind="qfedavg")[0]
    assert "a number is needed" in problems(kind="fedadam", eta="big")[0]
    assert "needs 7 clients" in problems(kind="bulyan", num_malicious_nodes=1)[0]
    assert "did you mean 'fedavg'" in problems(kind="fedavgg")[0]
    with pytest.raises(RunFileError):
        runner("krum", {}, clients=2, num_malicious_nodes=1)
