"""LoRA adapters as products: exact merging, truncation, and what averaging the factors gets wrong.

An adapter's change of a weight is s B A, with A (r x n), B (m x r), s = lora_alpha / r (or lora_alpha /
sqrt(r) for rank-stabilised LoRA). Nothing here forms an m x n matrix; all is done in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt

from fedpeft.errors import UpdateError

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """`a` (r x n), `b` (m x r) and the scaling s of s B A, told apart by name: shapes can be ambiguous."""

    a: npt.NDArray[np.floating]
    b: npt.NDArray[np.floating]
    scaling: float

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise UpdateError(
                f"LoRA factors A {self.a.shape} and B {self.b.shape}: (r, n) and (m, r) are needed"
            )
        if not (np.isfinite(self.a).all() and np.isfinite(self.b).all() and np.isfinite(self.scaling)):
            raise UpdateError("LoRA factors hold NaN or infinity: leave the adapter out")

    @property
    def rank(self) -> int:
        """R, the inner dimension."""
        return int(self.a.shape[0])


class Split(Enum):
    """Where truncated singular values go: all into B, or their root into each factor."""

    INTO_B = "into-b"
    BALANCED = "balanced"


@dataclass(frozen=True, eq=False)
class ProductSvd:
    """Thin singular value decomposition of a product: `u` (m x R), `singular_values` (R,), `vt` (R x n)."""

    u: Float64Array
    singular_values: Float64Array
    vt: Float64Array

    def truncation_error(self, rank: int) -> float:
        """Relative Frobenius norm of what rank `rank` leaves out; 0 for a zero product."""
        total = float(np.linalg.norm(self.singular_values))
        return float(np.linalg.norm(self.singular_values[rank:])) / total if total else 0.0


def stack(adapters: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """One adapter of rank sum r_i and scaling 1 whose product is exactly sum_i w_i s_i B_i A_i.

    Source: Wang et al. (2024), "FLoRA": A = [A_i] in rows, B = [w_i s_i B_i] in columns. The weight and the
    scaling go into one factor only, and each adapter brings its own scaling.

    Raises:
        UpdateError: no adapter, another number of weights, or other m or n.
    """
    _check(adapters, weights)
    a = np.concatenate([_wide(adapter.a) for adapter in adapters], axis=0)
    b = np.concatenate(
        [
            weight * adapter.scaling * _wide(adapter.b)
            for adapter, weight in zip(adapters, weights, strict=True)
        ],
        axis=1,
    )
    return LoraFactors(a, b, 1.0)


def product_svd(factors: LoraFactors) -> ProductSvd:
    """SVD of s B A in O((m + n) R^2): QR of B and of A^T, then the SVD of an R x R matrix.

    Singular vectors have no natural sign and none is stable across machines where values are close: the
    largest entry of each right vector is made positive, and one party should compute and send the result.
    Source: the identity B A = Q1 (R1 R2^T) Q2^T, as for FlexLoRA (Bai et al., 2024), which takes the m x n
    product.
    """
    q1, r1 = np.linalg.qr(factors.scaling * _wide(factors.b))
    q2, r2 = np.linalg.qr(_wide(factors.a).T)
    left, values, right = np.linalg.svd(r1 @ r2.T, full_matrices=False)
    u, vt = q1 @ left, right @ q2.T
    if vt.size:
        leading = vt[np.arange(len(vt)), np.abs(vt).argmax(axis=1)]
        signs = np.where(leading < 0, -1.0, 1.0)
        u, vt = u * signs, vt * signs[:, None]
    return ProductSvd(u, values, vt)


def truncate(svd: ProductSvd, rank: int, scaling: float, split: Split) -> LoraFactors:
    """The best rank-`rank` factors for an adapter with that `scaling`: s B A is the truncated product.

    A product of lower rank is padded with zeros.

    Raises:
        UpdateError: rank below 1 or beyond the matrix, or a scaling that is zero or not finite.
    """
    largest = min(svd.u.shape[0], svd.vt.shape[1])
    if not 1 <= rank <= largest:
        raise UpdateError(f"truncation to rank {rank}: from 1 to {largest} is possible")
    if not np.isfinite(scaling) or scaling == 0.0:
        raise UpdateError(f"LoRA scaling {scaling}: finite and not zero is needed")
    held = min(rank, svd.singular_values.size)
    b, a = np.zeros((svd.u.shape[0], rank)), np.zeros((rank, svd.vt.shape[1]))
    values = svd.singular_values[:held] / abs(scaling)
    root = np.sqrt(values) if split is Split.BALANCED else np.ones(held)
    b[:, :held] = np.sign(scaling) * svd.u[:, :held] * (values / np.where(root > 0, root, 1.0))
    a[:held] = svd.vt[:held] * root[:, None]
    return LoraFactors(a, b, scaling)


def merge_in_product_space(
    adapters: Sequence[LoraFactors], weights: Sequence[float], rank: int, scaling: float, split: Split
) -> LoraFactors:
    """The closest rank-`rank` adapter to sum_i w_i s_i B_i A_i in Frobenius norm. Raises as its halves."""
    return truncate(product_svd(stack(adapters, weights)), rank, scaling, split)


def relative_aggregation_error(adapters: Sequence[LoraFactors], weights: Sequence[float]) -> float:
    """||mean of products - product of means||_F / ||mean of products||_F; weights are normalised to sum 1.

    Source: sum_i p_i B_i A_i - mean(B) mean(A) = sum_i p_i (B_i - mean(B)) (A_i - mean(A)): the difference is
    itself a stacked product, so its norm is that of an R x R matrix, without cancellation. Scalings go into
    B. 0 when the mean of products and the difference both vanish, infinity when only the former does.

    Raises:
        UpdateError: as `stack`, adapters of different ranks, or weights that sum to 0.
    """
    _check(adapters, weights)
    if len({adapter.rank for adapter in adapters}) != 1:
        raise UpdateError("the mean of factors needs adapters of one rank: stack those of several ranks")
    total = float(sum(weights))
    if not total > 0.0:
        raise UpdateError(f"weights with sum {total}: a positive sum is needed")
    shares = [weight / total for weight in weights]
    bs = [adapter.scaling * _wide(adapter.b) for adapter in adapters]
    mean_a = sum(
        (share * _wide(adapter.a) for share, adapter in zip(shares, adapters, strict=True)), np.zeros(())
    )
    mean_b = sum((share * b for share, b in zip(shares, bs, strict=True)), np.zeros(()))
    deviations = [
        LoraFactors(_wide(adapter.a) - mean_a, b - mean_b, 1.0)
        for adapter, b in zip(adapters, bs, strict=True)
    ]
    difference = product_norm(stack(deviations, shares))
    products = product_norm(stack(adapters, shares))
    if products == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / products


def product_norm(factors: LoraFactors) -> float:
    """||s B A||_F from two QR factorisations: the norm of the R x R matrix R1 R2^T."""
    r1 = np.linalg.qr(factors.scaling * _wide(factors.b)).R
    r2 = np.linalg.qr(_wide(factors.a).T).R
    return float(np.linalg.norm(r1 @ r2.T))


def product_distance(first: LoraFactors, second: LoraFactors) -> float:
    """||s1 B1 A1 - s2 B2 A2||_F, as the norm of one stacked product; the ranks may differ.

    Near factors lose no digits, as they would if the distance came from the norms and the inner product.

    Raises:
        UpdateError: other m or n.
    """
    return product_norm(stack((first, second), (1.0, -1.0)))


def product_inner(first: LoraFactors, second: LoraFactors) -> float:
    """<s1 B1 A1, s2 B2 A2>, the sum of products of entries, in O((m + n) r1 r2); the ranks may differ.

    Source: trace((B1 A1)^T B2 A2) = sum of the entries of (B1^T B2) * (A1 A2^T).

    Raises:
        UpdateError: other m or n.
    """
    _check((first, second), (1.0, 1.0))
    inner = (_wide(first.b).T @ _wide(second.b)) * (_wide(first.a) @ _wide(second.a).T)
    return first.scaling * second.scaling * float(inner.sum())


def _check(adapters: Sequence[LoraFactors], weights: Sequence[float]) -> None:
    if not adapters or len(adapters) != len(weights):
        raise UpdateError(
            f"{len(adapters)} adapters and {len(weights)} weights: at least one adapter, one weight each"
        )
    if not all(np.isfinite(weight) for weight in weights):
        raise UpdateError(f"merging weights {tuple(weights)}: finite ones are needed")
    sizes = {(adapter.b.shape[0], adapter.a.shape[1]) for adapter in adapters}
    if len(sizes) != 1:
        raise UpdateError(f"LoRA factors for weights of shapes {sorted(sizes)}: merge adapters of one layer")


def _wide(array: npt.NDArray[np.floating]) -> Float64Array:
    return array.astype(np.float64)
