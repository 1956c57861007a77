"""TIES: trim, elect a sign, and average those that agree."""

from dataclasses import dataclass

import numpy as np

from fedpeft.adapters.stack import AdapterStack, Float32Array, Float64Array, as_delta
from fedpeft.codec.topk import count_selected, top_k_indices
from fedpeft.errors import UpdateError


@dataclass(frozen=True)
class Ties:
    """TIES merging with `density` kept per task and tensor, and the result times `lam`.

    Source: Yadav, Tam, Choshen, Raffel and Bansal (2023), "TIES-Merging", Algorithm 1: keep the top-k of each
    task vector; elect gamma = sgn(sum_t w_t tau_t); average the entries whose sign is gamma. Where kept
    entries cancel exactly, gamma is the majority sign of the whole adapter, as in the authors' code.
    Differences: trimming keeps exactly k entries per tensor (ties by index; one cut over the whole vector can
    erase LoRA's smaller factor, and a threshold keeps every tied entry); the mean divides by the sum of the
    agreeing weights.
    """

    density: float = 0.2
    lam: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise UpdateError(f"ties density {self.density}: above 0 and at most 1 is needed")

    def merge(self, stack: AdapterStack) -> dict[str, Float32Array]:
        """Trim, elect and average; entries that no task keeps are 0."""
        trimmed = {name: _trim(stack, name, self.density) for name in stack.names}
        sums = {name: (stack.weight_column * deltas).sum(axis=0) for name, deltas in trimmed.items()}
        votes = sum(float(np.sign(total).sum()) for total in sums.values())
        majority = 1.0 if votes >= 0 else -1.0
        return {
            name: as_delta(
                self.lam
                * _agreeing_mean(trimmed[name], stack.weight_column, _elect_signs(sums[name], majority)),
                stack.adapters[0][name].shape,
            )
            for name in stack.names
        }


def _trim(stack: AdapterStack, name: str, density: float) -> Float64Array:
    full = stack.tensor(name)
    trimmed = np.zeros_like(full)
    for task, adapter in enumerate(stack.adapters):
        kept = top_k_indices(adapter[name], count_selected(full.shape[1], density))
        trimmed[task, kept] = full[task, kept]
    return trimmed


def _elect_signs(total: Float64Array, majority: float) -> Float64Array:
    return np.where(total == 0.0, majority, np.sign(total))


def _agreeing_mean(deltas: Float64Array, weights: Float64Array, elected: Float64Array) -> Float64Array:
    agreeing = np.where(np.sign(deltas) == elected, weights, 0.0)
    mass = agreeing.sum(axis=0)
    mean: Float64Array = np.divide(
        (agreeing * deltas).sum(axis=0), mass, out=np.zeros_like(mass), where=mass > 0
    )
    return mean
