"""Whole adapters: a compressor over named deltas, and what it cost and changed."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fedpeft.codec.arrays import Float32Array
from fedpeft.codec.tensors import DenseTensor, Encoded
from fedpeft.errors import UpdateError

Compressor = Callable[[Mapping[str, Float32Array]], Mapping[str, Encoded]]
"""Compresses tensors by their canonical names."""


def compress_named(
    deltas: Mapping[str, Float32Array], compressor: Compressor, selects: Callable[[str], bool]
) -> dict[str, Encoded]:
    """Compress every tensor whose name `selects` accepts; the others are kept dense.

    Raises:
        UpdateError: no tensor with at least one entry was selected: a compressor that touches nothing is a
            mistake in the names it was given, not a success.
    """
    touched = [name for name, delta in deltas.items() if selects(name) and delta.size]
    if not touched:
        sample = ", ".join(sorted(deltas)[:3]) or "none"
        raise UpdateError(
            f"the compressor matches none of {len(deltas)} tensors (names such as {sample}): mend its filter"
        )
    chosen = compressor({name: deltas[name] for name in touched})
    return {name: chosen[name] if name in chosen else DenseTensor(delta) for name, delta in deltas.items()}


def dense_named(encoded: Mapping[str, Encoded]) -> dict[str, Float32Array]:
    """Every tensor as float32."""
    return {name: tensor.dense() for name, tensor in encoded.items()}


@dataclass(frozen=True)
class Distortion:
    """How far a lossy copy is from the original, over all tensors as one vector.

    `relative_l2` is ||copy - original|| / ||original||, `cosine` the cosine of the angle between them. Where
    the original is all zero: 0 and 1 if the copy is too, infinity and 0 if not.
    """

    relative_l2: float
    cosine: float


def distortion(original: Mapping[str, Float32Array], copy: Mapping[str, Float32Array]) -> Distortion:
    """Distortion of `copy`, in float64. Raises UpdateError when names or shapes differ."""
    if original.keys() != copy.keys():
        raise UpdateError("distortion needs the same tensors on both sides")
    error = squares = copy_squares = product = 0.0
    for name in sorted(original):
        if original[name].shape != copy[name].shape:
            raise UpdateError(
                f"distortion of {name!r}: shape {original[name].shape} against {copy[name].shape}"
            )
        wide, other = original[name].astype(np.float64), copy[name].astype(np.float64)
        error += float(np.sum((other - wide) ** 2))
        squares += float(np.sum(wide**2))
        copy_squares += float(np.sum(other**2))
        product += float(np.sum(wide * other))
    if squares == 0.0:
        return Distortion(0.0, 1.0) if copy_squares == 0.0 else Distortion(math.inf, 0.0)
    cosine = product / math.sqrt(squares * copy_squares) if copy_squares else 0.0
    return Distortion(math.sqrt(error / squares), cosine)
