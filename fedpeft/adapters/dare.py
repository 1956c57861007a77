"""DARE before task arithmetic: drop and rescale each task's entries, then add."""

from dataclasses import dataclass

import numpy as np

from fedpeft.adapters.stack import AdapterStack, Float32Array, as_delta
from fedpeft.codec.masks import PublicSource, tensor_stream
from fedpeft.codec.sparse import dare
from fedpeft.errors import UpdateError


@dataclass(frozen=True)
class DareMerge:
    """lam x sum_t w_t DARE(tau_t), with masks from a public counter stream: the same seed, the same bytes.

    Source: Yu et al. (2024), "Language Models are Super Mario", section 3.2. Every task has its own mask.
    Above a drop rate of 0.95 or so the published factor 1 / (1 - p) overshoots: search `lam` on held-out
    data.
    """

    seed: int
    drop_rate: float = 0.9
    lam: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.drop_rate < 1.0:
            raise UpdateError(f"dare drop_rate {self.drop_rate}: from 0 to below 1 is needed")

    def merge(self, stack: AdapterStack) -> dict[str, Float32Array]:
        """Weighted sum of the thinned deltas; depends on the order of the adapters through their masks."""
        merged = {}
        for name in stack.names:
            shape = stack.adapters[0][name].shape
            total = np.zeros(shape, dtype=np.float64)
            for task, (adapter, weight) in enumerate(zip(stack.adapters, stack.weights, strict=True)):
                source = PublicSource(self.seed, task, tensor_stream(name))
                total += weight * dare(adapter[name], self.drop_rate, source).dense().astype(np.float64)
            merged[name] = as_delta(self.lam * total, shape)
        return merged
