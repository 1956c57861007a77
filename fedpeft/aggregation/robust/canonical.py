"""One pair of factors for each product, whatever factors it came from."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedpeft.updates.low_rank import LoraFactors, ProductSvd

_NOTHING = 1e-9  # singular values below this share of the largest are rounding
Matrix = NDArray[np.float64]


def canonical(svd: ProductSvd, like: LoraFactors) -> LoraFactors:
    """The best rank-r factors of a product, in the form that lies nearest to `like`'s A.

    The rows of A are an orthonormal basis of the product's r largest right singular directions, turned to be
    as near as possible to the A of `like` (an orthogonal Procrustes problem), and as long as its rows are in
    the root mean square. B has the rest, and `like`'s scaling is taken out. So the trainer goes on from
    factors of the usual sizes, while they depend on the product alone. Where it has a lower rank, rows of
    `like`'s A go on from there, with zeros in B.

    Source: Procrustes by SVD as in Schoenemann 1966; that the choice of factors is free, ours to use.
    """
    rank = like.rank
    a = like.a.astype(np.float64)
    rows, columns = _directions(svd, a, rank)
    size = float(np.linalg.norm(a)) / np.sqrt(rank) or 1.0
    left, _, right = np.linalg.svd(a @ rows.T)
    turn = left @ right
    return LoraFactors(size * turn @ rows, columns @ turn.T / (size * like.scaling), like.scaling)


def _directions(svd: ProductSvd, a: Matrix, rank: int) -> tuple[Matrix, Matrix]:
    """Orthonormal rows [rank, n], and the columns [m, rank] that they are multiplied by."""
    values = svd.singular_values
    largest = float(values[0]) if values.size else 0.0
    held = int(np.sum(values[:rank] > _NOTHING * largest)) if largest > 0.0 else 0
    rows = svd.vt[:held]
    columns = np.zeros((svd.u.shape[0], rank))
    columns[:, :held] = svd.u[:, :held] * values[:held]
    if held < rank:
        left = a - (a @ rows.T) @ rows
        rows = np.concatenate([rows, np.linalg.svd(left, full_matrices=False)[2][: rank - held]])
    return rows, columns
