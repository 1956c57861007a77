"""LiNeS: scale a merged delta linearly from the first block to the last."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from fedpeft.adapters.stack import AdapterStack, Deltas, Float32Array, Float64Array, as_delta
from fedpeft.errors import UpdateError

# The first path component that is a number: `model.layers.3.mlp.experts.7.up` is in block 3.
_BLOCK = re.compile(r"(?:^|\.)(\d+)(?=\.)")


@dataclass(frozen=True)
class Lines:
    """Task arithmetic, then block l of L times alpha + beta x l / (L - 1), and the rest times alpha.

    Source: Wang et al. (2025), "LiNeS: Post-training Layer Scaling". `alpha` None takes their multi-task
    rule: (norm of the plain sum of the deltas) / (norm of the merged delta) / T. `beta` is searched on
    held-out data. Differences: the block is the first number of a name's dotted path (a substring search for
    ".i." also hits other numbers), and one block alone is block 0.
    """

    alpha: float | None = None
    beta: float = 1.0
    num_blocks: int | None = None

    def merge(self, stack: AdapterStack) -> dict[str, Float32Array]:
        """The weighted sum of the deltas, scaled by block."""
        total = {
            name: (stack.weight_column * stack.tensor(name))
            .sum(axis=0)
            .reshape(stack.adapters[0][name].shape)
            for name in stack.names
        }
        alpha = _multi_task_alpha(stack, total) if self.alpha is None else self.alpha
        factors = block_factors(total, alpha, self.beta, self.num_blocks)
        return {name: as_delta(factors[name] * delta, delta.shape) for name, delta in total.items()}


def _multi_task_alpha(stack: AdapterStack, merged: Mapping[str, Float64Array]) -> float:
    summed = math.sqrt(sum(float(np.sum(stack.tensor(name).sum(axis=0) ** 2)) for name in stack.names))
    norm = math.sqrt(sum(float(np.sum(delta**2)) for delta in merged.values()))
    return summed / norm / len(stack.adapters) if norm else 1.0 / len(stack.adapters)


def scale_blocks(
    deltas: Deltas, alpha: float, beta: float, num_blocks: int | None = None
) -> dict[str, Float32Array]:
    """LiNeS on one delta or on any merger's result; a single task takes alpha = a, beta = 1 - a.

    Raises UpdateError when a block lies beyond `num_blocks`, or the result exceeds float32.
    """
    factors = block_factors(deltas, alpha, beta, num_blocks)
    return {
        name: as_delta(factors[name] * delta.astype(np.float64), delta.shape)
        for name, delta in deltas.items()
    }


def block_factors(
    names: Iterable[str], alpha: float, beta: float, num_blocks: int | None
) -> dict[str, float]:
    """The factor of each tensor. `num_blocks` None counts up to the highest block that is named.

    Give the base's number of blocks when an adapter leaves the last ones out. Raises UpdateError when a name
    is of a block beyond it.
    """
    blocks = {name: block_index(name) for name in names}
    highest = max((block for block in blocks.values() if block is not None), default=0)
    count = highest + 1 if num_blocks is None else num_blocks
    if highest >= count:
        raise UpdateError(f"lines: block {highest} is named but the base has {count} blocks")
    last = max(1, count - 1)
    return {name: alpha if block is None else alpha + beta * block / last for name, block in blocks.items()}


def block_index(name: str) -> int | None:
    """Number of the block that a tensor belongs to, None outside blocks."""
    found = _BLOCK.search(name)
    return int(found.group(1)) if found else None
