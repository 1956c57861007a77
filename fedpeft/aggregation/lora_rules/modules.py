"""One module's round: the factors that came, and the next ones under each rule that acts on products.

All is done in float64, over replies in the order of clients' names, so that it does not depend on who
answered first. Scalings have been settled before: every factor here is meant with that of the global adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedpeft.errors import UpdateError
from fedpeft.updates.low_rank import LoraFactors, Split, product_norm, product_svd, stack, truncate

NOTHING_LEFT = 2.0**-24  # of the largest singular value: what storing factors as float32 loses anyway


@dataclass(frozen=True, eq=False)
class ModuleReplies:
    """What there is to combine.

    Attributes:
        state: the factors that the round began with.
        replies: each client's, whole, of the state's rank: padded with zeros where the client's is lower.
        shares: the clients' weights, with sum 1.
        residual: the frozen part that there is already; None: none.
        fresh_a: A as an untrained adapter of this round would have it.
        residual_rank: most ranks of the frozen part; None: as many as it takes.
    """

    state: LoraFactors
    replies: Sequence[LoraFactors]
    shares: Sequence[float]
    residual: LoraFactors | None
    fresh_a: Callable[[], npt.NDArray[np.float32]]
    residual_rank: int | None = None

    @property
    def products(self) -> LoraFactors:
        """The mean of products, as one adapter; the frozen part is not in it."""
        return stack(self.replies, self.shares)


@dataclass(frozen=True, eq=False)
class Combined:
    """The next factors, and the next frozen part (scaling 1); None: there is none."""

    factors: LoraFactors
    residual: LoraFactors | None = None


def hetlora(given: ModuleReplies) -> Combined:
    """Mean of padded factors, weighted by the Frobenius norms of the clients' products.

    Source: Cho et al. 2024, sparsity-weighted aggregation: |B_k A_k| over their sum, whatever the numbers of
    rows. Ours are of each module for itself. Where all products vanish, the clients' own weights count.
    """
    norms = [product_norm(reply) for reply in given.replies]
    total = sum(norms)
    weights = [norm / total for norm in norms] if total > 0.0 else list(given.shares)
    return Combined(_mean_of_factors(given, weights))


def flexlora(given: ModuleReplies) -> Combined:
    """The best factors of the state's rank for the mean of products: B = U S, A = V^T, ordered by size.

    A client of a lower rank takes the first ones, which are the best of that rank. Directions without any
    weight begin again with the state's A and a B of zero.

    Source: Bai et al. 2024, whose code forms the m x n products.
    """
    svd = product_svd(given.products)
    values = svd.singular_values
    if not values.size or not values[0] > 0.0:
        return Combined(given.state)
    rank = given.state.rank
    found = truncate(svd, min(rank, *_shape(given.state)), given.state.scaling, Split.INTO_B)
    a, b = given.state.a.astype(np.float64), np.zeros(given.state.b.shape)
    used = min(int(np.count_nonzero(values > NOTHING_LEFT * values[0])), found.rank)
    a[:used], b[:, :used] = found.a[:used], found.b[:, :used]
    return Combined(LoraFactors(a, b, given.state.scaling))


def flora(given: ModuleReplies) -> Combined:
    """Add the stacked products to the frozen part; begin again with a fresh A and a B of zero.

    Source: Wang et al. 2024, who add the product to the base's weights. A quantised base has no room for it,
    so that it stays a product here.
    """
    fresh = LoraFactors(given.fresh_a(), np.zeros(given.state.b.shape), given.state.scaling)
    return Combined(fresh, _truncate_small(given, given.products))


def exact_residual(given: ModuleReplies) -> Combined:
    """Means of factors; what their product misses goes to the frozen part.

    Source: Singhal et al. 2024, who add it to the base's weights; here it stays a product,
    sum_i p_i (B_i - mean(B)) (A_i - mean(A)), which loses no digits to cancellation.
    """
    mean = _mean_of_factors(given, given.shares)
    deviations = [LoraFactors(reply.a - mean.a, reply.b - mean.b, reply.scaling) for reply in given.replies]
    return Combined(mean, _truncate_small(given, stack(deviations, given.shares)))


RULES: Mapping[str, Callable[[ModuleReplies], Combined]] = {
    "hetlora": hetlora,
    "flexlora": flexlora,
    "flora": flora,
    "exact-residual": exact_residual,
}


def combine_named(name: str) -> Callable[[ModuleReplies], Combined] | None:
    """What a rule makes of a module; None where the strategy's mean of factors is all."""
    return RULES.get(name)


def compress_ranks(factors: LoraFactors, most: int | None, beside: float = 0.0) -> LoraFactors | None:
    """The same product in as few ranks as it takes, at most `most`; None for a product of zero.

    The factors share the singular values and are float32, as they are stored.

    Args:
        beside: the norm of what the product is added to, whose rounding hides singular values as well.
    """
    svd = product_svd(factors)
    values = svd.singular_values
    largest = max(beside, float(values[0]) if values.size else 0.0)
    needed = int(np.count_nonzero(values > NOTHING_LEFT * largest))
    if not needed:
        return None
    rank = min(needed, *_shape(factors), needed if most is None else most)
    found = truncate(svd, rank, 1.0, Split.BALANCED)
    return LoraFactors(found.a.astype(np.float32), found.b.astype(np.float32), 1.0)


def _truncate_small(given: ModuleReplies, more: LoraFactors) -> LoraFactors | None:
    parts = [part for part in (given.residual, more) if part is not None]
    beside = product_norm(given.products)
    return compress_ranks(stack(parts, [1.0] * len(parts)), given.residual_rank, beside)


def _mean_of_factors(given: ModuleReplies, weights: Sequence[float]) -> LoraFactors:
    if len({reply.a.shape for reply in given.replies}) != 1:
        raise UpdateError("the mean of factors needs factors of one shape: pad those of lower ranks")
    a, b = np.zeros(given.state.a.shape), np.zeros(given.state.b.shape)
    for weight, reply in zip(weights, given.replies, strict=True):
        a += weight * reply.a
        b += weight * reply.b
    return replace(given.state, a=a, b=b)


def _shape(factors: LoraFactors) -> tuple[int, int]:
    """(m, n) of the product."""
    return factors.b.shape[0], factors.a.shape[1]
