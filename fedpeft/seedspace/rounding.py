"""theta_0 + quantum * S with exactly one rounding, in any floating-point type and on any device.

quantum is a power of two and |S| < 2^53, so quantum * S is exact in float64. Their sum with theta_0 is not
always: rounding it to float64 and again to a shorter type can differ from rounding once. "Round to odd"
removes that: where the first rounding was inexact, the last bit is set, so the second one sees on which
side of a tie the exact sum lies.

Source: Boldo and Melquiond, "When double rounding is odd" (2005); the rounding error of a sum by Knuth's
TwoSum. Only IEEE additions, conversions and integer operations occur, so CPU and GPU agree.
"""

from importlib.util import find_spec

import torch

from fedpeft.errors import ModelError

_THROUGH_FLOAT32 = (torch.float16, torch.bfloat16)


def combine(base: torch.Tensor, sums: torch.Tensor, exponent: int) -> torch.Tensor:
    """Base + 2^exponent * sums in base's dtype, each weight rounded to nearest-even once.

    `sums` is an integer tensor of base's shape with |sums| < 2^53.

    Raises: ModelError when base isn't floating point.
    """
    if not base.is_floating_point():
        raise ModelError(f"weights are {base.dtype}: seed space moves floating-point tensors only")
    if base.dtype != torch.float64 and base.device.type == "cpu" and find_spec("numba"):
        result = _in_one_pass(base, sums, exponent)
        if result is not None:
            return result
    step = sums.to(torch.float64).mul_(2.0**exponent)
    exact = base.to(torch.float64)
    if base.dtype == torch.float64:
        return exact + step
    total = _odd_sum(exact, step)
    return total.to(base.dtype) if base.dtype not in _THROUGH_FLOAT32 else _odd_float32(total).to(base.dtype)


def _in_one_pass(base: torch.Tensor, sums: torch.Tensor, exponent: int) -> torch.Tensor | None:
    """The usual case by compiled code; None where some sum isn't exact in float64, so that care is needed."""
    from fedpeft.seedspace.numba_round import add_exactly, add_to_odd

    kernel = add_exactly if base.dtype == torch.float32 else add_to_odd
    wide = base.detach().float().reshape(-1)
    result = torch.empty_like(wide)
    whole = sums.reshape(-1).to(torch.int64)
    inexact = kernel(wide.numpy(), whole.numpy(), 2.0**exponent, result.numpy())
    return None if inexact else result.view(base.shape).to(base.dtype)


def _odd_sum(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A + b rounded to odd in float64."""
    total = a + b
    # TwoSum: error is exactly (a + b) - total.
    shadow = total - a
    error = (a - (total - shadow)).add_(b.sub(shadow))
    if bool(error.any()):
        _make_odd(total.view(torch.int64), total, error)
    return total


def _odd_float32(values: torch.Tensor) -> torch.Tensor:
    """float64 rounded to odd in float32."""
    short = values.to(torch.float32)
    error = values - short.to(torch.float64)
    _make_odd(short.view(torch.int32), short, error)
    return short


def _make_odd(bits: torch.Tensor, rounded: torch.Tensor, error: torch.Tensor) -> None:
    """Moves inexact values whose last bit is 0 to the neighbour on the error's side, whose bit is 1.

    Sign and magnitude: one up in the bit pattern is one step away from zero. A zero that comes from
    underflow keeps its sign and can only move outwards. Infinities and NaN stay what they are.
    """
    outwards = ((error > 0) == (rounded > 0)) | (rounded == 0)
    step = torch.where(outwards, 1, -1).to(bits.dtype)
    bits.add_(step.mul_((error != 0) & error.isfinite() & (bits & 1 == 0)))
