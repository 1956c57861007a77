"""The multiple of the standard deviation that serves a client's held-out rows best.

Source: Yadav, Choshen and Raffel 2023, ComPEFT, section 2.1: alpha is found on validation data, without
training. One alpha for all tensors of an update, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedpeft.codec import TernaryTensor, distortion, rescale
from fedpeft.codec.ternary import ALPHA_GRID
from fedpeft.errors import UpdateError
from fedpeft.stages.base import StageContext
from fedpeft.updates.update import EncodedArray, Update

SEARCH = "search"


def search_alpha(sent: Update, given: Update, context: StageContext) -> Update:
    """`sent`, whose alpha is 1, with the alpha of the grid that has the lowest held-out loss.

    Of equal ones the smallest. Adds the metric ``alpha``, and measures the distortion anew.

    Args:
        given: the update before it was compressed.

    Raises:
        UpdateError: the client has no held-out rows, or none of the grid has a loss that is a number.
    """
    if context.held_out_loss is None:
        raise UpdateError(
            f"{context.client}: alpha = '{SEARCH}' needs held-out rows and there are none; raise"
            " data.heldout, or use stage 'ternary'"
        )
    losses = {alpha: context.held_out_loss(_dense(_scale(sent, alpha))) for alpha in ALPHA_GRID}
    numbers = {alpha: loss for alpha, loss in losses.items() if np.isfinite(loss)}
    if not numbers:
        raise UpdateError(f"{context.client}: no alpha of {len(losses)} has a held-out loss that is a number")
    best = min(numbers, key=lambda alpha: (numbers[alpha], alpha))
    encoded = _scale(sent, best)
    lost = distortion(given.arrays, _dense(encoded))
    metrics = {**sent.metrics, "alpha": best, "distortion": lost.relative_l2, "cosine": lost.cosine}
    return replace(sent, encoded=encoded, metrics=metrics)


def _scale(sent: Update, alpha: float) -> dict[str, EncodedArray]:
    """What was ternarised, times alpha; what travels whole stays."""
    return {
        name: rescale(tensor, alpha) if isinstance(tensor, TernaryTensor) else tensor
        for name, tensor in sent.encoded.items()
    }


def _dense(encoded: Mapping[str, EncodedArray]) -> dict[str, NDArray[np.float32]]:
    return {name: tensor.dense() for name, tensor in encoded.items()}
