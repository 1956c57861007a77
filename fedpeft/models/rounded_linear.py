"""Linear layers of frozen integers: weights rounded to the nearest of 2^bits levels per row or group.

W = s (q - z) with q and z integers of `bits` bits, one scale s and zero z for each group of columns of a row:
s = (max - min) / (2^bits - 1), z = round(-min / s), q = round(W / s) + z, all cut to the range; min and max
include zero, so that zero is a level. Weights of 4 bits lie two to a byte.

Source: asymmetric round-to-nearest as the starting point of Kim et al. 2023, PEQA (arXiv 2305.14152),
equation 1; ours has integer zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Levels", "Rounded", "RoundedLinear", "levels_of", "multiply_rounded", "unpack"]

_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Levels:
    """How finely weights are rounded.

    Attributes:
        bits: 4 or 8.
        group_size: columns that share a scale; None: a whole row does.
    """

    bits: int
    group_size: int | None = None

    def groups(self, columns: int) -> int:
        """Scales per row of a weight with so many columns.

        Raises:
            ValueError: groups don't divide the columns, or 4-bit numbers don't fill bytes.
        """
        if self.bits == 4 and columns % 2:
            raise ValueError(f"{columns} columns came, and 4-bit weights need an even number")
        size = self.group_size or columns
        if columns % size:
            raise ValueError(f"{columns} columns came, which groups of {size} don't divide")
        return columns // size


@dataclass(frozen=True)
class Rounded:
    """A rounded matrix of shape (out, in).

    Attributes:
        codes: uint8 (out, in), or packed (out, in / 2) where numbers have 4 bits.
        scale: float32 (out, groups).
        zero: uint8 (out, groups).
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


def levels_of(weight: torch.Tensor, levels: Levels) -> Rounded:
    """Round a weight (out, in); rows are worked on in blocks, so that no second matrix is held whole."""
    groups, top = levels.groups(weight.shape[1]), 2**levels.bits - 1
    parts = [
        _round_to_levels(rows.float(), groups, top, levels.bits) for rows in torch.split(weight, _CHUNK_ROWS)
    ]
    return Rounded(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _round_to_levels(
    rows: torch.Tensor, groups: int, top: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grouped = rows.reshape(len(rows), groups, -1)  # (out, groups, size)
    least, most = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = (most - least) / top
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.round(-least / scale).clamp(0, top)
    codes = (torch.round(grouped / scale[..., None]) + zero[..., None]).clamp(0, top)
    flat = codes.to(torch.uint8).reshape(len(rows), -1)
    if bits == 4:
        flat = flat[:, 0::2] | (flat[:, 1::2] << 4)
    return flat, scale, zero.to(torch.uint8)


def unpack(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The weight s (q - z), float32 (out, in)."""
    centred = _centre(codes, zero, bits)
    return centred.mul_(scale.float()[..., None]).view(len(codes), -1)


def _centre(codes: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Q - z, float32 (out, groups, size)."""
    rows, groups = zero.shape
    if bits == 4:
        whole = torch.empty(rows, 2 * codes.shape[1], device=codes.device)
        whole[:, 0::2] = codes & 15
        whole[:, 1::2] = codes >> 4
    else:
        whole = codes.float()
    return whole.view(rows, groups, -1).sub_(zero.float()[..., None])


class _Product(torch.autograd.Function):
    """x W^T with W rebuilt from its integers in both directions, so that no unpacked weight is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
    ) -> torch.Tensor:
        ctx.bits, ctx.dtype = bits, x.dtype
        kept = x if scale.requires_grad else x.new_empty(0)
        ctx.save_for_backward(kept, codes, scale, zero)
        return nn.functional.linear(x, unpack(codes, scale, zero, bits).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, codes, scale, zero = ctx.saved_tensors
        to_x = to_scale = None
        if ctx.needs_input_grad[0]:
            weight = unpack(codes, scale, zero, ctx.bits).to(gradient.dtype)
            to_x = (gradient @ weight).to(ctx.dtype)
        if ctx.needs_input_grad[2]:
            flat = gradient.reshape(-1, gradient.shape[-1])  # (tokens, out)
            to_weight = (flat.t() @ x.reshape(-1, x.shape[-1]).to(flat.dtype)).float()
            centred = _centre(codes, zero, ctx.bits)
            to_scale = to_weight.view_as(centred).mul_(centred).sum(-1).to(scale.dtype)
        return to_x, None, to_scale, None, None


def multiply_rounded(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    bias: torch.Tensor | None,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Map x (..., in) to (..., out) by the rounded weight; `scale` can train.

    Args:
        compute_dtype: of the product; None: that of x. Under autocast, autocast's.
    """
    device = x.device.type
    wanted = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else compute_dtype
    inputs = x if wanted is None else x.to(wanted)
    if torch.is_grad_enabled():
        product: torch.Tensor = _Product.apply(inputs, codes, scale, zero, bits)  # type: ignore[no-untyped-call]
    else:
        product = nn.functional.linear(inputs, unpack(codes, scale, zero, bits).to(inputs.dtype))
    if bias is not None:
        product = product + bias.to(product.dtype)
    return product if torch.is_autocast_enabled(device) else product.to(x.dtype)


class RoundedLinear(nn.Linear):
    """A frozen linear layer of integers.

    `weight` holds the codes, `weight_scale` and `weight_zero` what turns them into numbers; see `Rounded`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        levels: Levels,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a weight of floats
        groups = levels.groups(in_features)
        width = in_features // 2 if levels.bits == 4 else in_features
        self.in_features, self.out_features, self.levels = in_features, out_features, levels
        self.compute_dtype = dtype

        codes = torch.zeros(out_features, width, dtype=torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale: torch.Tensor
        self.weight_zero: torch.Tensor
        self.register_buffer("weight_scale", torch.zeros(out_features, groups))
        self.register_buffer("weight_zero", torch.zeros(out_features, groups, dtype=torch.uint8))
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False)
        else:
            self.register_parameter("bias", None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in_features) to (..., out_features)."""
        return self.product(input, self.weight_scale)

    def product(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """As `forward`, with other scales of the same shape."""
        bits, bias = self.levels.bits, self.bias
        return multiply_rounded(x, self.weight, scale, self.weight_zero, bits, bias, self.compute_dtype)

    def dequantise(self) -> nn.Linear:
        """An ordinary layer with the same weight, in float32."""
        with torch.device("meta"):
            plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        weight = unpack(self.weight, self.weight_scale, self.weight_zero, self.levels.bits)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            plain.bias = self.bias
        return plain

    def take(self, weight: torch.Tensor) -> None:
        """Round a weight (out, in) and hold it."""
        rounded = levels_of(weight, self.levels)
        self.weight = nn.Parameter(rounded.codes, requires_grad=False)
        self.weight_scale, self.weight_zero = rounded.scale, rounded.zero

    def extra_repr(self) -> str:
        """Shape and levels."""
        return f"in_features={self.in_features}, out_features={self.out_features}, levels={self.levels}"
