"""Project: exact dot products of an integer vector with many directions, and the quantisation before it."""

import math

import torch

from fedpeft.errors import UpdateError
from fedpeft.seedspace.backends import kernels_for
from fedpeft.seedspace.bounds import check_delta, check_directions
from fedpeft.seedspace.layout import CounterStream, Span

MIN_EXPONENT, MAX_EXPONENT = -1000, 900


def project(
    stream: CounterStream,
    span: Span,
    directions: torch.Tensor,
    delta: torch.Tensor,
    *,
    backend: str | None = None,
    threads: int = 1,
) -> torch.Tensor:
    """int64 [K] on the CPU: <delta, z_k> for int64 [span.size] `delta` on any device.

    Raises: UpdateError when shapes or types are wrong or a dot product could overflow.
    """
    check_directions(directions)
    check_delta(delta, span.size)
    kernels, support = kernels_for(delta.device, backend), stream.support
    mask = None if support is None else support.mask(span.tensor_id)
    if mask is not None:
        delta = delta * mask[span.start : span.stop].to(delta.device)
    dots = kernels.project(stream, span, directions.contiguous(), delta.contiguous(), threads)
    return dots if support is None else dots * support.moves(span.tensor_id, directions)


def quantise(values: torch.Tensor, exponent: int) -> torch.Tensor:
    """int64 of the same shape: values / 2^exponent, rounded to nearest, ties to even.

    The division is exact (a power of two in float64), so there is one rounding.

    Raises: UpdateError for values that are not finite, or too large for 53 bits at this quantum.
    """
    if not MIN_EXPONENT <= exponent <= MAX_EXPONENT:
        raise UpdateError(f"quantum 2^{exponent} is out of range: need 2^{MIN_EXPONENT} to 2^{MAX_EXPONENT}")
    scaled = values.detach().to(torch.float64) * math.ldexp(1.0, -exponent)
    if not bool((scaled.abs() < 2**53).all()):  # false for NaN too
        raise UpdateError(
            f"values are not finite or exceed 2^53 quanta of 2^{exponent}: use a coarser quantum"
        )
    return scaled.round().to(torch.int64)


def exponent_for(largest: float, bits: int) -> int:
    """The smallest exponent whose quantum represents magnitudes up to `largest` in `bits` bits and a sign.

    Raises: UpdateError for a `largest` that is negative or not finite.
    """
    if not (math.isfinite(largest) and largest >= 0):
        raise UpdateError(f"the largest magnitude is {largest}: need a finite number from 0 up")
    if largest == 0:
        return MIN_EXPONENT
    return max(MIN_EXPONENT, math.frexp(largest)[1] - bits)
