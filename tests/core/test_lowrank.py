"""LoRA products: everything against the dense m x n matrices."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import UpdateError
from fedpeft.updates.low_rank import (
    LoraFactors,
    Split,
    merge_in_product_space,
    product_distance,
    product_inner,
    product_norm,
    product_svd,
    relative_aggregation_error,
    stack,
    truncate,
)


def dense(factors: LoraFactors) -> npt.NDArray[np.float64]:
    m, n = factors.b.shape[0], factors.a.shape[1]
    out = np.zeros((m, n))
    for i in range(m):
        for j in range(n):
            out[i, j] = factors.scaling * sum(
                float(factors.b[i, k]) * float(factors.a[k, j]) for k in range(factors.a.shape[0])
            )
    return out


def adapter(rng: np.random.Generator, m: int, n: int, r: int, scaling: float = 2.0) -> LoraFactors:
    return LoraFactors(rng.standard_normal((r, n)).astype(np.float32), rng.standard_normal((m, r)), scaling)


sizes = st.tuples(st.integers(1, 6), st.integers(1, 6))
ranks = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)
@given(sizes, ranks, st.integers(0, 2**32))
def test_stacking_and_svd_are_exact_for_any_ranks_and_scalings(
    size: tuple[int, int], of_rank: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    adapters = [adapter(rng, *size, r, scaling=float(rng.uniform(0.5, 4))) for r in of_rank]
    weights = rng.uniform(0.1, 1, len(adapters)).tolist()
    exact = sum((w * dense(one) for w, one in zip(weights, adapters, strict=True)), np.zeros(size))
    both = stack(adapters, weights)
    assert both.rank == sum(of_rank)
    assert np.allclose(dense(both), exact, atol=1e-12)
    svd = product_svd(both)
    assert np.allclose(svd.u @ np.diag(svd.singular_values) @ svd.vt, exact, atol=1e-10)
    expected = np.linalg.svd(exact, compute_uv=False)
    assert np.allclose(svd.singular_values[: len(expected)], expected[: len(svd.singular_values)], atol=1e-10)
    assert product_norm(both) == pytest.approx(np.sqrt(np.sum(exact**2)), rel=1e-10, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32))
def test_distances_and_inner_products_are_those_of_the_dense_matrices(
    size: tuple[int, int], rank: int, other_rank: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    one, other = adapter(rng, *size, rank), adapter(rng, *size, other_rank, scaling=-0.5)
    distance = float(np.sqrt(np.sum((dense(one) - dense(other)) ** 2)))
    assert product_distance(one, other) == pytest.approx(distance, rel=1e-10, abs=1e-12)
    inner = float(np.sum(dense(one) * dense(other)))
    assert product_inner(one, other) == pytest.approx(inner, rel=1e-10, abs=1e-10)


def test_near_products_keep_their_distance() -> None:
    one = adapter(np.random.default_rng(1), 30, 20, 4)
    b = one.b.copy()
    b[3, 2] += 1e-9
    near = LoraFactors(one.a, b, one.scaling)
    # The difference is 1e-9 s times row 2 of A in row 3; B itself rounds it at 1e-16.
    expected = 1e-9 * one.scaling * float(np.linalg.norm(one.a[2].astype(np.float64)))
    assert product_distance(one, near) == pytest.approx(expected, rel=1e-5)
    assert product_distance(one, one) < 1e-13


@pytest.mark.parametrize("split", list(Split))
@pytest.mark.parametrize("scaling", [0.25, -2.0])
@pytest.mark.parametrize("rank", [1, 3, 5, 6])
def test_truncation_is_the_best_of_its_rank(rank: int, scaling: float, split: Split) -> None:
    rng = np.random.default_rng(rank)
    adapters = [adapter(rng, 7, 6, 2), adapter(rng, 7, 6, 3, scaling=0.5)]
    exact = 0.3 * dense(adapters[0]) + 0.7 * dense(adapters[1])
    merged = merge_in_product_space(adapters, [0.3, 0.7], rank, scaling, split)
    assert merged.scaling == scaling
    assert merged.a.shape == (rank, 6)
    u, s, vt = np.linalg.svd(exact)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert np.allclose(dense(merged), best, atol=1e-10)
    left_out = np.linalg.norm(exact - best) / np.linalg.norm(exact)
    assert product_svd(stack(adapters, [0.3, 0.7])).truncation_error(rank) == pytest.approx(
        left_out, abs=1e-9
    )


def test_balanced_factors_share_the_singular_values() -> None:
    merged = truncate(product_svd(adapter(np.random.default_rng(0), 9, 5, 3)), 3, 1.0, Split.BALANCED)
    assert np.allclose(merged.a @ merged.a.T, merged.b.T @ merged.b)
    into_b = truncate(product_svd(adapter(np.random.default_rng(0), 9, 5, 3)), 3, 1.0, Split.INTO_B)
    assert np.allclose(into_b.a @ into_b.a.T, np.eye(3))


def test_signs_of_singular_vectors_are_fixed() -> None:
    for seed in range(5):
        vt = product_svd(adapter(np.random.default_rng(seed), 6, 8, 3)).vt
        assert (vt.max(axis=1) == np.abs(vt).max(axis=1)).all()


def test_a_hidden_size_equal_to_the_rank_is_not_ambiguous() -> None:
    rng = np.random.default_rng(2)
    square = [adapter(rng, 4, 4, 4), adapter(rng, 4, 4, 4)]
    exact = 0.5 * dense(square[0]) + 0.5 * dense(square[1])
    assert np.allclose(dense(merge_in_product_space(square, [0.5, 0.5], 4, 1.0, Split.BALANCED)), exact)


def test_a_fresh_adapter_merges_to_zero() -> None:
    fresh = LoraFactors(np.ones((2, 5)), np.zeros((4, 2)), 2.0)
    merged = merge_in_product_space([fresh, fresh], [1, 1], 3, 2.0, Split.BALANCED)
    assert np.allclose(dense(merged), 0.0)
    assert product_svd(fresh).truncation_error(1) == 0.0


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32))
def test_aggregation_error_is_that_of_the_dense_matrices(
    size: tuple[int, int], rank: int, count: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    adapters = [adapter(rng, *size, rank) for _ in range(count)]
    weights = rng.uniform(0.1, 1, count)
    shares = weights / weights.sum()
    mean_of_products = sum((p * dense(one) for p, one in zip(shares, adapters, strict=True)), np.zeros(size))
    mean_a = sum((p * one.a for p, one in zip(shares, adapters, strict=True)), np.zeros(()))
    mean_b = sum((p * one.b for p, one in zip(shares, adapters, strict=True)), np.zeros(()))
    expected = np.linalg.norm(mean_of_products - 2.0 * mean_b @ mean_a) / np.linalg.norm(mean_of_products)
    assert relative_aggregation_error(adapters, weights.tolist()) == pytest.approx(
        expected, rel=1e-6, abs=1e-12
    )


def test_independent_adapters_lose_nearly_everything_and_shared_a_nothing() -> None:
    rng = np.random.default_rng(0)
    adapters = [adapter(rng, 60, 80, 8) for _ in range(10)]
    assert 0.9 < relative_aggregation_error(adapters, [1.0] * 10) < 1.0
    shared = [LoraFactors(adapters[0].a, one.b, 2.0) for one in adapters]
    # The identity has no cancellation: what is left is rounding of the mean of A, not its square root.
    assert relative_aggregation_error(shared, [1.0] * 10) < 1e-13


def test_degenerate_aggregation_errors() -> None:
    fresh = LoraFactors(np.ones((2, 5)), np.zeros((4, 2)), 2.0)
    assert relative_aggregation_error([fresh, fresh], [1, 1]) == 0.0
    left = LoraFactors(np.array([[1.0, 0.0]]), np.array([[1.0]]), 1.0)
    right = LoraFactors(np.array([[-1.0, 0.0]]), np.array([[1.0]]), 1.0)
    # The products cancel and so do the means of A: nothing is lost.
    assert relative_aggregation_error([left, right], [1, 1]) == 0.0
    # 1 x 1 and -1 x 2, weighted 2 to 1, cancel as products but not as factors.
    odd = LoraFactors(np.array([[-2.0, 0.0]]), np.array([[1.0]]), 1.0)
    other = LoraFactors(np.array([[1.0, 0.0]]), np.array([[2.0]]), 1.0)
    assert relative_aggregation_error([odd, other], [1, 1]) == np.inf


def test_what_cannot_be_merged_is_refused() -> None:
    rng = np.random.default_rng(0)
    one, other = adapter(rng, 4, 5, 2), adapter(rng, 5, 4, 2)
    with pytest.raises(UpdateError, match="one layer"):
        stack([one, other], [1, 1])
    with pytest.raises(UpdateError, match="one layer"):
        product_inner(one, other)
    with pytest.raises(UpdateError, match="one layer"):
        product_distance(one, other)
    with pytest.raises(UpdateError, match="one weight each"):
        stack([one], [])
    with pytest.raises(UpdateError, match="finite"):
        stack([one], [np.inf])
    with pytest.raises(UpdateError, match="one rank"):
        relative_aggregation_error([one, adapter(rng, 4, 5, 3)], [1, 1])
    with pytest.raises(UpdateError, match="positive sum"):
        relative_aggregation_error([one], [0])
    with pytest.raises(UpdateError, match="rank 5"):
        truncate(product_svd(one), 5, 1.0, Split.INTO_B)
    with pytest.raises(UpdateError, match="scaling"):
        truncate(product_svd(one), 1, 0.0, Split.INTO_B)
    with pytest.raises(UpdateError, match="are needed"):
        LoraFactors(np.ones((2, 3)), np.ones((3, 3)), 1.0)
    with pytest.raises(UpdateError, match="NaN"):
        LoraFactors(np.full((2, 3), np.nan), np.ones((3, 2)), 1.0)
