"""Rules on inner products, against the same rules written on the vectors themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpeft.aggregation.robust import geometric_median, krum, krum_selection, multikrum, norm_bound

Vectors = NDArray[np.float64]
CLIENTS, SIZE = 9, 14


def vectors(seed: int, outliers: int = 0) -> Vectors:
    rng = np.random.default_rng(seed)
    given = rng.normal(size=(CLIENTS, SIZE)) + 2.0
    given[:outliers] += 50.0 * rng.normal(size=(outliers, SIZE))
    return given


def shares(seed: int) -> NDArray[np.float64]:
    weights = np.random.default_rng(seed + 100).random(CLIENTS) + 0.1
    return np.asarray(weights / weights.sum())


def scores(given: Sequence[NDArray[np.float64]], malicious: int) -> list[float]:
    """Blanchard et al. 2017, section 4, from the vectors."""
    found = []
    for place, vector in enumerate(given):
        distances = sorted(
            float(np.sum((vector - other) ** 2)) for at, other in enumerate(given) if at != place
        )
        found.append(sum(distances[: max(1, len(given) - malicious - 2)]))
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("malicious", [0, 1, 3])
def test_krum_and_multikrum(seed: int, malicious: int) -> None:
    given, weights = vectors(seed, outliers=1), shares(seed)
    order = np.argsort(scores(list(given), malicious))
    one = krum(given @ given.T, weights, num_malicious_nodes=malicious)
    np.testing.assert_array_equal(one, np.eye(CLIENTS)[order[0]])
    several = multikrum(given @ given.T, weights, num_malicious_nodes=malicious, num_nodes_to_select=4)
    expected = np.zeros(CLIENTS)
    expected[order[:4]] = weights[order[:4]] / weights[order[:4]].sum()
    np.testing.assert_allclose(several, expected, rtol=1e-12)


def test_bulyans_selection_is_krum_again_and_again() -> None:
    given = vectors(7, outliers=1)
    left = list(range(CLIENTS))
    expected: list[int] = []
    while len(expected) < 7:
        best = int(np.argmin(scores([given[place] for place in left], 1)))
        expected.append(left.pop(best))
    assert krum_selection(given @ given.T, 7, 1) == expected


def test_norm_bound_scales_to_the_bound_and_no_further() -> None:
    given, weights = vectors(1, outliers=3), shares(1)
    norms = np.linalg.norm(given, axis=1)
    for options, bound in (
        ({}, np.median(norms)),
        ({"multiple": 0.5}, 0.5 * np.median(norms)),
        ({"clip_norm": 3.0}, 3.0),
    ):
        factors = norm_bound(given @ given.T, weights, **options) / weights
        cut = np.linalg.norm(given * factors[:, None], axis=1)
        np.testing.assert_allclose(cut, np.minimum(norms, bound), rtol=1e-10)


def test_norm_bound_of_nothing_is_nothing() -> None:
    given = np.zeros((3, 2))
    given[2] = 5.0
    factors = norm_bound(given @ given.T, np.full(3, 1 / 3))
    np.testing.assert_array_equal(factors @ given, np.zeros(2))


@pytest.mark.parametrize("outliers", [0, 4])
def test_the_geometric_median_is_where_all_pulls_cancel(outliers: int) -> None:
    """The cost is convex and its gradient is the sum of weighted unit vectors: zero at the minimum only."""
    given, weights = vectors(3, outliers), shares(3)
    came = geometric_median(given @ given.T, weights)
    assert came.sum() == pytest.approx(1.0)
    away = came @ given - given
    pulls = away / np.linalg.norm(away, axis=1)[:, None]
    np.testing.assert_allclose(weights @ pulls, 0.0, atol=1e-6)
    mean = weights @ given - given
    assert (
        np.linalg.norm(weights @ (mean / np.linalg.norm(mean, axis=1)[:, None])) > 0.01
    )  # the mean is not it


def test_the_geometric_median_may_be_one_of_the_points() -> None:
    """Three on a line, the middle one: where plain Weiszfeld would divide by zero."""
    given = np.array([[0.0], [1.0], [5.0]])
    came = geometric_median(given @ given.T, np.full(3, 1 / 3))
    np.testing.assert_allclose(came @ given, [1.0], atol=1e-3)


@pytest.mark.parametrize("rule", [krum, multikrum, norm_bound, geometric_median])
def test_a_single_update_and_equal_updates_are_themselves(rule: object) -> None:
    assert callable(rule)
    for count in (1, 4):
        given = np.tile(np.arange(1.0, 4.0), (count, 1))
        came = rule(given @ given.T, np.full(count, 1 / count))
        np.testing.assert_allclose(came @ given, given[0], rtol=1e-9)
