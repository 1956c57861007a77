"""The aggregation error: how far the next adapter is from the mean of what the clients' adapters compute.

The relative Frobenius distance between the weights' change that the next global adapter makes and the mean of
the clients' changes, their weights being those of the run (`federation.weighting`), over all LoRA modules
together. For a rule of the mean of factors it is that of the plain mean, whatever the strategy makes of it.

Nothing of size m x n is formed: both norms are those of R x R matrices (`fedpeft.updates.low_rank`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedpeft.aggregation.lora_rules.modules import Combined, ModuleReplies
from fedpeft.updates.low_rank import LoraFactors, product_norm, stack


@dataclass(frozen=True)
class Distance:
    """Frobenius norms of one module: of the difference, and of the mean of the clients' changes."""

    missed: float
    exact: float

    @property
    def relative(self) -> float:
        """Their ratio; 0 where both vanish, infinity where only the mean does."""
        if self.exact == 0.0:
            return 0.0 if self.missed == 0.0 else math.inf
        return self.missed / self.exact


def together(distances: Iterable[Distance]) -> Distance:
    """Of several modules as one."""
    rows = list(distances)
    return Distance(math.hypot(*(row.missed for row in rows)), math.hypot(*(row.exact for row in rows)))


def distance_of(given: ModuleReplies, made: Combined | None) -> Distance:
    """One module's distance.

    Args:
        made: the next factors as a rule of products made them; None: the mean of factors is meant.
    """
    frozen = [] if given.residual is None else [given.residual]
    exact = product_norm(_sum(*frozen, given.products))
    if made is None:
        return Distance(product_norm(_error_of_means(given)), exact)
    left = [] if made.residual is None else [made.residual]
    after = _sum(*left, _as_stored(made.factors))
    return Distance(product_norm(stack((_sum(*frozen, given.products), after), (1.0, -1.0))), exact)


def _error_of_means(given: ModuleReplies) -> LoraFactors:
    """Source: mean(B A) - mean(B) mean(A) = sum_i p_i (B_i - mean(B)) (A_i - mean(A)): no cancellation."""
    mean_a = sum((share * reply.a for share, reply in zip(given.shares, given.replies, strict=True)), 0.0)
    mean_b = sum((share * reply.b for share, reply in zip(given.shares, given.replies, strict=True)), 0.0)
    deviations = [LoraFactors(reply.a - mean_a, reply.b - mean_b, reply.scaling) for reply in given.replies]
    return stack(deviations, given.shares)


def _sum(*parts: LoraFactors) -> LoraFactors:
    return stack(parts, [1.0] * len(parts))


def _as_stored(factors: LoraFactors) -> LoraFactors:
    """As the state holds them."""
    return LoraFactors(factors.a.astype(np.float32), factors.b.astype(np.float32), factors.scaling)
