"""Checks that make overflow impossible: refused before any kernel runs."""

import math

import torch

from fedpeft.errors import UpdateError
from fedpeft.seedspace.layout import MAX_DIRECTION

# Sums are converted to float64 once; below 2^53 that conversion is exact.
MAX_SUM = 2**53


def check_directions(directions: torch.Tensor) -> None:
    """Refuses anything but int64 [K] of indices in [0, 2^32).

    Raises: UpdateError.
    """
    if directions.dim() != 1 or directions.dtype != torch.int64 or directions.device.type != "cpu":
        raise UpdateError(
            f"directions are {directions.dtype} of shape {tuple(directions.shape)} on {directions.device}: "
            "need int64 [K] on the CPU"
        )
    if len(directions) and not 0 <= int(directions.min()) <= int(directions.max()) <= MAX_DIRECTION:
        raise UpdateError(
            f"direction indices reach from {int(directions.min())} to {int(directions.max())}: "
            f"need 0 to {MAX_DIRECTION}"
        )


def check_amounts(directions: torch.Tensor, amounts: torch.Tensor) -> int:
    """Sum of |A_k|, which no coordinate of sum_k A_k z_k can exceed.

    Raises: UpdateError for wrong shapes or types, or when the sum reaches 2^53.
    """
    check_directions(directions)
    if amounts.shape != directions.shape or amounts.dtype != torch.int64 or amounts.device.type != "cpu":
        raise UpdateError(
            f"amounts are {amounts.dtype} of shape {tuple(amounts.shape)} for {len(directions)} directions: "
            "need one int64 each, on the CPU"
        )
    total = sum(abs(int(amount)) for amount in amounts.tolist())
    if total >= MAX_SUM:
        raise UpdateError(f"amounts add up to {total} in magnitude: a sum in seed space must stay below 2^53")
    return total


def check_delta(delta: torch.Tensor, size: int) -> None:
    """Refuses integers whose dot product with signs could leave 62 bits.

    Raises: UpdateError for a wrong shape or type, or too large magnitudes.
    """
    if delta.dtype != torch.int64 or tuple(delta.shape) != (size,):
        raise UpdateError(f"delta is {delta.dtype} of shape {tuple(delta.shape)}: need int64 [{size}]")
    if not size:
        return
    largest = max(abs(int(delta.min())), abs(int(delta.max())))
    # Kernels form twice a sum of magnitudes: 2 * size * largest must fit 63 bits.
    if largest * size >= 2**61:
        raise UpdateError(
            f"delta reaches {largest} over {size} coordinates: a dot product could overflow 64 bits; "
            "use a coarser quantum"
        )


def check_scale(scale: float) -> None:
    """Refuses a perturbation scale that is not finite.

    Raises: UpdateError.
    """
    if not math.isfinite(scale):
        raise UpdateError(f"perturbation scale {scale} is not finite: choose a finite one")
