"""What every merging rule takes: adapters of one base as named float32 deltas, with one weight each."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedpeft.errors import UpdateError

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Deltas = Mapping[str, Float32Array]


@dataclass(frozen=True)
class AdapterStack:
    """T >= 1 adapters with the same tensors, in a fixed order of names, and T non-negative weights."""

    adapters: tuple[Deltas, ...]
    weights: tuple[float, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Tensor names, sorted."""
        return tuple(sorted(self.adapters[0]))

    def tensor(self, name: str) -> Float64Array:
        """All adapters' deltas of one tensor, float64 of shape (T, d)."""
        return np.stack([adapter[name].astype(np.float64).reshape(-1) for adapter in self.adapters])

    @property
    def weight_column(self) -> Float64Array:
        """The weights as float64 of shape (T, 1)."""
        return np.array(self.weights, dtype=np.float64)[:, None]


class Merger(Protocol):
    """A merging rule with its coefficients."""

    def merge(self, stack: AdapterStack) -> dict[str, Float32Array]:
        """One delta per tensor of the stack, float32, in the tensors' shapes."""
        ...


def adapter_stack(adapters: Sequence[Deltas], weights: Sequence[float] | None = None) -> AdapterStack:
    """Check that the adapters can be merged at all; no weights means 1 for each.

    Raises:
        UpdateError: no adapter; other names, shapes or dtypes; NaN or infinity; a negative or non-finite
            weight, all
            weights zero, or another number of weights than adapters.
    """
    if not adapters or not adapters[0]:
        raise UpdateError("merging needs at least one adapter with at least one tensor")
    for number, adapter in enumerate(adapters):
        _check_like(adapters[0], adapter, number)
    chosen = tuple(float(weight) for weight in weights) if weights is not None else (1.0,) * len(adapters)
    if len(chosen) != len(adapters):
        raise UpdateError(f"{len(chosen)} weights for {len(adapters)} adapters: give one each")
    if any(not math.isfinite(weight) or weight < 0 for weight in chosen) or not any(chosen):
        raise UpdateError(f"merging weights {chosen}: finite, non-negative ones are needed, not all zero")
    return AdapterStack(tuple(adapters), chosen)


def map_tensors(stack: AdapterStack, rule: Callable[[Float64Array], Float64Array]) -> dict[str, Float32Array]:
    """Apply `rule`, from (T, d) to (d,) in float64, to each tensor and round once."""
    return {name: as_delta(rule(stack.tensor(name)), stack.adapters[0][name].shape) for name in stack.names}


def as_delta(flat: Float64Array, shape: tuple[int, ...]) -> Float32Array:
    """`flat` as float32 of `shape`. Raises UpdateError if it no longer fits float32."""
    with np.errstate(over="ignore"):
        delta = flat.astype(np.float32).reshape(shape)
    if not np.isfinite(delta).all():
        raise UpdateError("the merged delta exceeds float32: lower lam or the weights")
    return delta


def _check_like(first: Deltas, adapter: Deltas, number: int) -> None:
    if adapter.keys() != first.keys():
        odd = sorted(adapter.keys() ^ first.keys())[0]
        raise UpdateError(
            f"adapter {number} and adapter 0 differ in tensor {odd!r}: merge adapters of one kind"
        )
    for name, delta in adapter.items():
        if delta.shape != first[name].shape or delta.dtype != np.float32:
            raise UpdateError(
                f"adapter {number}: {name!r} is {delta.dtype} {delta.shape}, not float32 {first[name].shape}"
            )
        if not np.isfinite(delta).all():
            raise UpdateError(f"adapter {number}: {name!r} holds NaN or infinity, leave it out")
