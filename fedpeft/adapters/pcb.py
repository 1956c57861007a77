"""PCB: entries compete within and between tasks for a place in the merged delta."""

from dataclasses import dataclass

import numpy as np

from fedpeft.adapters.stack import AdapterStack, Float32Array, Float64Array, map_tensors
from fedpeft.codec.topk import count_selected
from fedpeft.errors import UpdateError

_CLAMPED_SHARE = 1e-4


@dataclass(frozen=True)
class Pcb:
    """Parameter-competition balancing: keep the `density` fraction with the best scores, weigh by the score.

    Source: Du et al. (2024), "Parameter Competition Balancing for Model Merging", equations for
    intra-balancing exp(T norm(|tau|)^2), inter-balancing tanh(tau_t x sum_j tau_j), and merged = lam x sum_t
    s_t tau_t / sum_t s_t, with norm the scaling to [0, 1]. Magnitudes are clamped at their 1e-4 quantiles
    first, as in the authors' code. Differences: scores, quantiles and the cut are per tensor, since LoRA's
    factors have different scales; weights multiply the scores s_t; tensors where no score stands out (all
    equal) become 0.
    """

    density: float = 0.1
    lam: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise UpdateError(f"pcb density {self.density}: above 0 and at most 1 is needed")

    def merge(self, stack: AdapterStack) -> dict[str, Float32Array]:
        """Score, cut and average each tensor in float64."""
        return map_tensors(
            stack, lambda deltas: self.lam * _balance(deltas, stack.weight_column, self.density)
        )


def _balance(deltas: Float64Array, weights: Float64Array, density: float) -> Float64Array:
    if deltas.shape[1] == 0:
        return np.zeros(0)
    magnitudes = np.stack([_clamp(row, _CLAMPED_SHARE) for row in np.abs(deltas)])
    intra = np.exp(len(deltas) * _unit_range(magnitudes) ** 2)
    inter = np.tanh(deltas * deltas.sum(axis=0))
    strengths = weights * _unit_range(_raise_to_floor(intra * inter, density))
    total = strengths.sum(axis=0)
    weighted = (strengths * np.sign(deltas) * magnitudes).sum(axis=0)
    merged: Float64Array = np.divide(weighted, total, out=np.zeros_like(total), where=total > 0)
    return merged


def _clamp(row: Float64Array, share: float) -> Float64Array:
    """Clip to the values at rank floor(share x d) from either end."""
    ordered = np.sort(row)
    cut = int(share * row.size)
    return np.clip(row, ordered[cut], ordered[row.size - 1 - cut])


def _raise_to_floor(scores: Float64Array, density: float) -> Float64Array:
    """Raise all but the best `density` fraction of each row to the best score that is left out."""
    size = scores.shape[1]
    left_out = size - count_selected(size, density)
    if left_out == 0:
        return scores
    floor = np.partition(scores, left_out - 1, axis=1)[:, left_out - 1 : left_out]
    return np.maximum(scores, floor)


def _unit_range(rows: Float64Array) -> Float64Array:
    """Each row to [0, 1]; a row of equal values to 0."""
    low = rows.min(axis=1, keepdims=True)
    span = rows.max(axis=1, keepdims=True) - low
    scaled: Float64Array = np.divide(rows - low, span, out=np.zeros_like(rows), where=span > 0)
    return scaled
