"""Rules that say by how much each update counts, given nothing but their inner products.

The norms of updates and the distances between them are functions of the Gram matrix, whatever the geometry it
was measured in, and so are the distances from any weighted mean. A rule is a function of

    gram: float64 [n, n], inner products of the updates
    weights: float64 [n], how much each would count in the mean; positive, sum 1

and of its options, and returns float64 [n], what each update is multiplied by before they are added. None
changes if all updates are turned, and none depends on their order but by breaking ties.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Gram = NDArray[np.float64]
Coefficients = Callable[..., Vector]

_STEPS = 1000  # of Weiszfeld's iteration, which ends long before
_STILL = 1e-10  # largest change of a coefficient in its last step
_SMOOTH = 1e-6  # distances below this share of the median norm count as this far


def norm_bound(
    gram: Gram, weights: Vector, *, clip_norm: float | None = None, multiple: float = 1.0
) -> Vector:
    """The mean, with longer updates scaled down to a bound: `clip_norm`, or `multiple` medians of the norms.

    Source: Sun, Kairouz, Suresh and McMahan 2019, "Can You Really Backdoor Federated Learning?", section 4,
    for the fixed bound. The median of a round's own norms is ours: a hostile minority can't move it beyond
    the honest ones, and it needs no tuning.
    """
    norms = norms_of(gram)
    bound = multiple * float(np.median(norms)) if clip_norm is None else clip_norm
    result: Vector = weights * np.minimum(1.0, bound / np.where(norms > 0.0, norms, 1.0))
    return result


def krum(gram: Gram, weights: Vector, *, num_malicious_nodes: float = 0) -> Vector:
    """The one update nearest to its neighbours.

    Source: Blanchard, El Mhamdi, Guerraoui and Stainer 2017, section 4.
    """
    return multikrum(gram, weights, num_malicious_nodes=num_malicious_nodes)


def multikrum(
    gram: Gram, weights: Vector, *, num_malicious_nodes: float = 0, num_nodes_to_select: float = 1
) -> Vector:
    """The weighted mean of the updates with the least Krum scores.

    Source: Blanchard, El Mhamdi, Guerraoui and Stainer 2017, section 4; unweighted there.
    """
    chosen = krum_order(gram, int(num_malicious_nodes))[: int(num_nodes_to_select)]
    result = np.zeros(len(weights))
    result[chosen] = weights[chosen] / weights[chosen].sum()
    return result


def geometric_median(gram: Gram, weights: Vector) -> Vector:
    """The point with the least weighted sum of distances to the updates, as a mean of them.

    Source: Pillutla, Kakade and Harchaoui 2022, RFA, algorithm 2 (smoothed Weiszfeld); run until it stands
    still, as it costs O(n^2) a step here, and started at the weighted mean.
    """
    norms = norms_of(gram)
    least = _SMOOTH * float(np.median(norms))
    point = weights
    for _ in range(_STEPS):
        squares = np.diag(gram) - 2.0 * gram @ point + point @ gram @ point
        distances = np.sqrt(np.maximum(squares, 0.0))
        pull = weights / np.maximum(distances, max(least, np.finfo(np.float64).tiny))
        moved = pull / pull.sum()
        still = float(np.abs(moved - point).max()) < _STILL
        point = moved
        if still:
            break
    return point


def krum_selection(gram: Gram, count: int, num_malicious_nodes: int) -> list[int]:
    """The `count` updates that Krum picks one after another, each time among those that are left.

    Source: El Mhamdi, Guerraoui and Rouault 2018, Bulyan, algorithm 2, its first half.
    """
    left = list(range(len(gram)))
    chosen: list[int] = []
    while len(chosen) < count:
        best = krum_order(gram[np.ix_(left, left)], num_malicious_nodes)[0]
        chosen.append(left.pop(best))
    return chosen


def krum_order(gram: Gram, num_malicious_nodes: int) -> list[int]:
    """Places of the updates by Krum's score, the least first.

    The score is the sum of the n - f - 2 least squared distances to others, of one at least. Equal scores
    keep their order.
    """
    n = len(gram)
    if n == 1:
        return [0]
    nearest = min(n - 1, max(1, n - num_malicious_nodes - 2))
    squares = compute_squared_distances(gram)
    others = squares[~np.eye(n, dtype=bool)].reshape(n, n - 1)
    scores = np.sort(others, axis=1)[:, :nearest].sum(axis=1)
    return [int(place) for place in np.argsort(scores, kind="stable")]


def norms_of(gram: Gram) -> Vector:
    """float64 [n]."""
    norms: Vector = np.sqrt(np.maximum(np.diag(gram), 0.0))
    return norms


def compute_squared_distances(gram: Gram) -> NDArray[np.float64]:
    """float64 [n, n], not negative."""
    squares = np.diag(gram)
    result: NDArray[np.float64] = np.maximum(squares[:, None] + squares[None, :] - 2.0 * gram, 0.0)
    return result
