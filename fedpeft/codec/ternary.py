"""Ternary deltas: the signs of the k largest magnitudes of a tensor or of a whole update, and one scale.

Sources: Sattler, Wiedemann, Mueller and Samek (2019), sparse ternary compression, algorithm 1: each tensor by
itself, its scale the mean kept magnitude. Yadav, Choshen and Raffel (2023), ComPEFT, algorithm 1: one cut
over the whole task vector, its scale alpha times the standard deviation of the unsparsified vector. In both,
ties have a fixed order here; the standard deviation divides by d.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedpeft.codec.arrays import Float32Array, Int8Array, flat_float32
from fedpeft.codec.tensors import TernaryTensor
from fedpeft.codec.topk import count_selected, find_cut, moments, top_k_signs
from fedpeft.errors import UpdateError

DENSITY_GRID = (0.05, 0.1, 0.2, 0.3, 0.5)
"""Fractions kept that the paper searches."""
ALPHA_GRID = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
"""Multiples of the standard deviation that the paper searches on held-out data."""


class ScaleRule(Protocol):
    """How a ternary tensor gets its scale from the whole delta and the kept signs (both flat)."""

    def scale(self, flat: Float32Array, trits: Int8Array) -> float:
        """A finite, non-negative scale; 0 only if no sign is kept or the rule says so."""
        ...


@dataclass(frozen=True)
class StdScale:
    """alpha x standard deviation of the unsparsified delta.

    A constant tensor (a size-1 one, say) has deviation 0, which would lose it in silence: the rule then takes
    alpha x the root mean square instead.
    """

    alpha: float = 1.0

    def scale(self, flat: Float32Array, trits: Int8Array) -> float:
        """The multiple of the deviation, whatever was kept."""
        found = moments(flat)
        return self.alpha * (found.std or found.rms)


@dataclass(frozen=True)
class LeastSquaresScale:
    """The scale that minimises ||delta - scale x signs||_2 for the kept signs: the mean kept magnitude."""

    def scale(self, flat: Float32Array, trits: Int8Array) -> float:
        """<delta, signs> / number of signs, in float64."""
        kept = trits != 0
        count = int(np.count_nonzero(kept))
        return float(np.abs(flat[kept]).sum(dtype=np.float64) / count) if count else 0.0


@dataclass(frozen=True)
class FixedScale:
    """A scale that is given: one public value for all clients, as sums under masks or under noise need."""

    value: float

    def scale(self, flat: Float32Array, trits: Int8Array) -> float:
        """The given value."""
        return self.value


def ternarise(delta: npt.NDArray[np.floating], density: float, rule: ScaleRule) -> TernaryTensor:
    """Compress one float32 delta tensor to signs and a scale.

    Args:
        delta: float32, any shape; the change since the shared start, never raw weights.
        density: fraction of entries whose sign is kept; entries equal to zero are never kept.
        rule: gives the scale.

    Raises:
        UpdateError: not float32, not finite, density outside [0, 1], or a scale that is negative or not
            finite.

    Example:
        >>> import numpy as np
        >>> delta = np.array([0.1, -3.0, 0.2, 2.0], dtype=np.float32)
        >>> ternarise(delta, 0.5, LeastSquaresScale()).dense()
        array([ 0. , -2.5,  0. ,  2.5], dtype=float32)
    """
    flat = flat_float32(delta)
    trits = top_k_signs(flat, find_cut(flat, count_selected(flat.size, density)))
    return TernaryTensor(trits.reshape(delta.shape), rule.scale(flat, trits))


def ternarise_together(
    deltas: Mapping[str, Float32Array], density: float, rule: ScaleRule
) -> dict[str, TernaryTensor]:
    """Compress all float32 deltas as one vector: one cut and one scale for all of them.

    Tensors without a non-zero entry are left out of the vector: they never moved.

    Args:
        deltas: by name; their order in the vector is that of the sorted names.
        density: fraction of the vector's entries whose sign is kept; entries equal to zero are never kept.
        rule: gives the scale, from the whole vector.

    Raises:
        UpdateError: as for `ternarise`.
    """
    moved = [name for name in sorted(deltas) if deltas[name].any()]
    vector = np.concatenate([flat_float32(deltas[name]) for name in moved] or [np.zeros(0, np.float32)])
    whole = ternarise(vector, density, rule)
    ends = np.cumsum([deltas[name].size for name in moved], dtype=np.int64)
    parts = dict(zip(moved, np.split(whole.trits, ends[:-1]), strict=True)) if moved else {}
    return {
        name: TernaryTensor(parts[name].reshape(delta.shape), whole.scale)
        if name in parts
        else TernaryTensor(np.zeros(delta.shape, np.int8), 0.0)
        for name, delta in deltas.items()
    }


def rescale(tensor: TernaryTensor, factor: float) -> TernaryTensor:
    """The same signs with `factor` x scale: how a grid of alpha is searched after one selection."""
    if factor < 0.0:
        raise UpdateError(f"ternary factor {factor}: it must not be negative")
    return TernaryTensor(tensor.trits, tensor.scale * factor)
