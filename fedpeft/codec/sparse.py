"""Sparse deltas with float32 values: the largest magnitudes, or public random positions."""

import numpy as np
import numpy.typing as npt

from fedpeft.codec.arrays import finite_float32, flat_float32
from fedpeft.codec.masks import BernoulliMask, PublicSource, RandomKMask, keep_threshold
from fedpeft.codec.tensors import MaskedTensor, SparseTensor
from fedpeft.codec.topk import count_selected, top_k_indices
from fedpeft.errors import UpdateError


def top_k(delta: npt.NDArray[np.floating], density: float) -> SparseTensor:
    """Keep the `density` fraction with the largest magnitudes, values untouched.

    Source: Aji and Heafield (2017), with the order (magnitude descending, index ascending).

    Raises:
        UpdateError: not float32, not finite, or density outside [0, 1].
    """
    flat = flat_float32(delta)
    indices = top_k_indices(delta, count_selected(flat.size, density))
    return SparseTensor(delta.shape, indices, flat[indices])


def random_k(delta: npt.NDArray[np.floating], density: float, source: PublicSource) -> MaskedTensor:
    """Keep the `density` fraction at public random positions, values untouched: for error feedback.

    Source: Stich, Cordonnier and Jaggi (2018), "Sparsified SGD with Memory". The positions do not depend on
    the data, so the map is linear and sums of clients that share `source` are sums over one support.

    Raises:
        UpdateError: not float32, not finite, or density outside [0, 1].
    """
    flat = finite_float32(delta)
    mask = RandomKMask(source, count_selected(flat.size, density))
    return MaskedTensor(delta.shape, mask, flat[mask.indices(flat.size)], gain=1.0)


def select_unbiased_random_k(
    delta: npt.NDArray[np.floating], density: float, source: PublicSource
) -> MaskedTensor:
    """`random_k` times d / k: over seeds, the mean is the delta itself.

    Raises:
        UpdateError: as `random_k`, and density 0, which no gain can undo.
    """
    biased = random_k(delta, density, source)
    if delta.size and not biased.values.size:
        raise UpdateError("unbiased random-k at density 0: keep at least one entry")
    return MaskedTensor(
        biased.shape, biased.mask, biased.values, gain=delta.size / max(1, biased.values.size)
    )


def dare(delta: npt.NDArray[np.floating], drop_rate: float, source: PublicSource) -> MaskedTensor:
    """Drop each entry with probability `drop_rate` and multiply the rest by 1 / (1 - drop_rate).

    Source: Yu, Yu, Yu, Huang and Li (2024), "Language Models are Super Mario", DARE. The mask comes from a
    public counter stream, so that it can be rebuilt and need not travel.

    Raises:
        UpdateError: not float32, not finite, or drop_rate outside [0, 1).
    """
    if not 0.0 <= drop_rate < 1.0:
        raise UpdateError(f"DARE drop rate {drop_rate}: from 0 to below 1 is needed")
    flat = finite_float32(delta)
    mask = BernoulliMask(source, keep_threshold(1.0 - drop_rate))
    return MaskedTensor(delta.shape, mask, flat[mask.indices(flat.size)], gain=1.0 / (1.0 - drop_rate))
