"""Model Breadcrumbs: leave out each task's largest entries and its smallest, then add."""

import math
from dataclasses import dataclass

import numpy as np

from fedpeft.adapters.stack import AdapterStack, Float32Array, Float64Array, map_tensors
from fedpeft.codec.topk import count_selected
from fedpeft.errors import UpdateError


@dataclass(frozen=True)
class Breadcrumbs:
    """Per tensor, drop the `gamma` fraction of largest magnitudes and keep the next `density`; lam x the sum.

    Source: Davari and Belilovsky (2024), "Model Breadcrumbs". Ranks have the order (magnitude descending,
    index ascending), and counts are of entries: `gamma` 0, or a tensor too small for one outlier, drops none
    at the top.
    """

    density: float = 0.9
    gamma: float = 0.01
    lam: float = 0.3

    def __post_init__(self) -> None:
        if not (
            0.0 < self.density <= 1.0 and 0.0 <= self.gamma < 1.0 and self.density + self.gamma <= 1.0 + 1e-9
        ):
            raise UpdateError(
                f"breadcrumbs density {self.density} and gamma {self.gamma}: fractions of sum at most 1"
            )

    def merge(self, stack: AdapterStack) -> dict[str, Float32Array]:
        """Weighted sum of the masked deltas, in float64."""
        return map_tensors(
            stack, lambda deltas: self.lam * (stack.weight_column * self._mask(deltas)).sum(axis=0)
        )

    def _mask(self, deltas: Float64Array) -> Float64Array:
        size = deltas.shape[1]
        top = math.floor(self.gamma * size)
        kept = min(count_selected(size, self.density), size - top)
        masked = np.zeros_like(deltas)
        for task, row in enumerate(deltas):
            ranked = np.argsort(-np.abs(row), kind="stable")[top : top + kept]
            masked[task, ranked] = row[ranked]
        return masked
