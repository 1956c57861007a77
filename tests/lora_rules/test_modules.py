"""What each rule makes of one module, against dense m x n matrices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpeft.aggregation.lora_rules import Combined, ModuleReplies, combine_named, distance_of, together
from fedpeft.aggregation.lora_rules.modules import compress_ranks
from fedpeft.updates.low_rank import LoraFactors, product_norm

Matrix = NDArray[np.float64]
M, N, RANK, SCALING = 9, 7, 3, 2.0
SHARES = (0.5, 0.3, 0.2)


def dense(factors: LoraFactors | None) -> Matrix:
    """s B A, entry by entry."""
    if factors is None:
        return np.zeros((M, N))
    out = np.zeros((M, N))
    for k in range(factors.a.shape[0]):
        out += factors.scaling * np.outer(factors.b[:, k].astype(np.float64), factors.a[k].astype(np.float64))
    return out


def factors_of(seed: int, rank: int = RANK, scaling: float = SCALING) -> LoraFactors:
    """Random, of the state's rank: ranks beyond `rank` are zero."""
    rng = np.random.default_rng(seed)
    a, b = np.zeros((RANK, N)), np.zeros((M, RANK))
    a[:rank], b[:, :rank] = rng.standard_normal((rank, N)), rng.standard_normal((M, rank))
    return LoraFactors(a, b, scaling)


def fresh() -> NDArray[np.float32]:
    return np.full((RANK, N), 0.25, dtype=np.float32)


def given_of(
    ranks: Sequence[int] = (3, 2, 1), *, residual: LoraFactors | None = None, most: int | None = None
) -> ModuleReplies:
    replies = [factors_of(10 + place, rank) for place, rank in enumerate(ranks)]
    return ModuleReplies(factors_of(1), replies, SHARES, residual, fresh, most)


def combined(rule: str, given: ModuleReplies) -> Combined:
    combine = combine_named(rule)
    assert combine is not None
    return combine(given)


def mean_of_products(given: ModuleReplies) -> Matrix:
    products = [share * dense(reply) for share, reply in zip(given.shares, given.replies, strict=True)]
    return sum(products, dense(given.residual))


def plain_residual() -> LoraFactors:
    rng = np.random.default_rng(5)
    return LoraFactors(rng.standard_normal((2, N)), rng.standard_normal((M, 2)), 1.0)


@pytest.mark.parametrize("rule", ["flora", "exact-residual"])
@pytest.mark.parametrize("residual", [None, plain_residual()])
def test_rules_with_a_frozen_part_lose_nothing(rule: str, residual: LoraFactors | None) -> None:
    given = given_of(residual=residual)
    made = combined(rule, given)
    wanted = mean_of_products(given)
    assert np.allclose(dense(made.factors) + dense(made.residual), wanted, rtol=0.0, atol=2e-6)
    assert distance_of(given, made).relative < 1e-6


def test_flora_begins_afresh_and_exact_residual_at_the_means() -> None:
    given = given_of()
    begun = combined("flora", given).factors
    assert np.array_equal(begun.a, fresh())
    assert not begun.b.any()
    mean = combined("exact-residual", given).factors
    for which in ("a", "b"):
        wanted = sum(
            share * getattr(reply, which) for share, reply in zip(SHARES, given.replies, strict=True)
        )
        assert np.allclose(getattr(mean, which), wanted, atol=1e-14)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_flexlora_gives_every_rank_its_best_factors(rank: int) -> None:
    """A client's part is the first ranks: no factors of that rank are nearer to the mean of products."""
    given = given_of((3, 3, 3))
    made = combined("flexlora", given).factors
    wanted = mean_of_products(given)
    u, s, vt = np.linalg.svd(wanted)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    part = LoraFactors(made.a[:rank], made.b[:, :rank], made.scaling)
    assert np.allclose(dense(part), best, atol=1e-9)
    assert np.allclose(made.a @ made.a.T, np.eye(RANK))  # all sizes are in B, as published


def test_flexlora_gives_unused_directions_the_old_a() -> None:
    given = given_of((1, 1, 0))
    made = combined("flexlora", given).factors
    assert np.allclose(dense(made), mean_of_products(given), atol=1e-9)
    assert np.array_equal(made.a[2], given.state.a[2])
    assert not made.b[:, 2].any()
    nothing = ModuleReplies(given.state, [factors_of(3, 0)], (1.0,), None, fresh)
    assert combined("flexlora", nothing).factors is given.state


def test_hetlora_weighs_by_the_norms_of_products() -> None:
    given = given_of()
    norms = [float(np.sqrt(np.sum(dense(reply) ** 2))) for reply in given.replies]
    made = combined("hetlora", given).factors
    for which in ("a", "b"):
        wanted = sum(
            norm / sum(norms) * getattr(reply, which)
            for norm, reply in zip(norms, given.replies, strict=True)
        )
        assert np.allclose(getattr(made, which), wanted, atol=1e-12)
    untrained = [LoraFactors(reply.a, np.zeros((M, RANK)), SCALING) for reply in given.replies]
    still = combined("hetlora", ModuleReplies(given.state, untrained, SHARES, None, fresh)).factors
    assert np.allclose(still.a, sum(p * r.a for p, r in zip(SHARES, untrained, strict=True)))


@pytest.mark.parametrize("rule", [None, "hetlora", "flexlora"])
def test_the_error_is_the_distance_of_the_dense_matrices(rule: str | None) -> None:
    given = given_of((3, 3, 2))
    made = None if rule is None else combined(rule, given)
    if made is None:  # the plain means
        a, b = (
            sum((p * getattr(r, w) for p, r in zip(SHARES, given.replies, strict=True)), 0.0) for w in "ab"
        )
        after = dense(LoraFactors(np.asarray(a), np.asarray(b), SCALING))
    else:
        after = dense(made.factors)
    wanted = mean_of_products(given)
    found = distance_of(given, made)
    assert found.exact == pytest.approx(float(np.linalg.norm(wanted)), rel=1e-9)
    assert found.missed == pytest.approx(float(np.linalg.norm(wanted - after)), rel=1e-5)
    both = together([found, found])
    assert both.relative == pytest.approx(found.relative)
    assert both.exact == pytest.approx(np.sqrt(2.0) * found.exact)


def test_equal_adapters_are_averaged_without_error_and_nothing_is_no_error() -> None:
    one = factors_of(2)
    same = ModuleReplies(one, [one, one], (0.5, 0.5), None, fresh)
    assert distance_of(same, None).relative < 1e-12
    zero = ModuleReplies(one, [factors_of(3, 0)] * 2, (0.5, 0.5), None, fresh)
    assert distance_of(zero, None).relative == 0.0


def test_a_capped_frozen_part_is_the_best_of_its_rank_and_says_what_it_lost() -> None:
    given = given_of((3, 3, 3), most=2)
    made = combined("flora", given)
    assert made.residual is not None
    assert made.residual.rank == 2
    wanted = mean_of_products(given)
    u, s, vt = np.linalg.svd(wanted)
    assert np.allclose(dense(made.residual), (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)
    lost = np.linalg.norm(s[2:]) / np.linalg.norm(s)
    assert distance_of(given, made).relative == pytest.approx(float(lost), rel=1e-4)


def test_squeezing_finds_the_rank_of_a_product() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, N)), rng.standard_normal((M, 2))
    wide = LoraFactors(np.concatenate([a, a, a]), np.concatenate([b, -b, b], axis=1), 3.0)
    small = compress_ranks(wide, None)
    assert small is not None
    assert (small.rank, small.scaling) == (2, 1.0)
    assert np.allclose(dense(small), dense(wide), atol=1e-5)
    assert product_norm(small) == pytest.approx(product_norm(wide), rel=1e-6)
    assert compress_ranks(LoraFactors(a, np.zeros((M, 2)), 1.0), None) is None
    assert (
        compress_ranks(wide, None, beside=1e9 * product_norm(wide)) is None
    )  # rounding of the larger hides it
