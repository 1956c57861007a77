"""Perturb: weights plus a scaled direction, into a buffer, for any coordinates of a tensor."""

from dataclasses import replace

import torch

from fedpeft.errors import TrainingError
from fedpeft.seedspace.backends import Shift, kernels_for
from fedpeft.seedspace.bounds import check_scale
from fedpeft.seedspace.layout import CounterStream

_COMPUTED_AS_ITSELF = (torch.float32, torch.float64)
_COMPUTED_IN_FLOAT32 = (torch.float16, torch.bfloat16)


def perturb(
    stream: CounterStream,
    tensor_id: int,
    direction: int,
    weights: torch.Tensor,
    scale: float,
    *,
    start: int = 0,
    out: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Weights + scale * z, in the shape and dtype of `weights`; its first element is coordinate `start`.

    float32 and float64 add in their own precision with `scale` rounded to it: one rounding. float16 and
    bfloat16 add in float32 and round once more. `out` may be `weights` itself; it has to be contiguous.

    Raises: TrainingError for an integer tensor or a strided `out`; UpdateError for a scale that isn't finite.
    """
    result = torch.empty_like(weights, memory_format=torch.contiguous_format) if out is None else out
    if not result.is_contiguous():
        raise TrainingError("the buffer for perturbed weights is strided: pass a contiguous one")
    begin = torch.tensor([start])
    _write(stream, tensor_id, direction, weights.reshape(1, -1), begin, scale, result.view(1, -1), backend)
    return result


def prepare(
    stream: CounterStream,
    tensor_id: int,
    weights: torch.Tensor,
    *,
    start: int = 0,
    backend: str | None = None,
) -> Shift:
    """`perturb` of the same weights for many directions: `shift(direction, scale, out)`, with a finite scale.

    What depends on neither is worked out here, once: for a small layer it takes longer than the perturbation.
    The weights may change between calls, but not their place in memory.

    Raises: TrainingError for an integer tensor.
    """
    source = weights.detach()
    kernels = kernels_for(source.device, backend)
    plain = stream.support is None and source.dtype in _COMPUTED_AS_ITSELF and source.is_contiguous()
    if kernels.prepare is not None and plain:
        return kernels.prepare(stream, tensor_id, source, start)
    _check_dtype(source)

    def shift(direction: int, scale: float, out: torch.Tensor) -> None:
        perturb(stream, tensor_id, direction, source, scale, start=start, out=out, backend=backend)

    return shift


def perturb_rows(
    stream: CounterStream,
    tensor_id: int,
    direction: int,
    table: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """[len(rows), width]: the given rows of a perturbed [height, width] table, without perturbing the others.

    Raises: TrainingError for an integer table; UpdateError for a scale that isn't finite.
    """
    picked = table.detach().index_select(0, rows)
    result = torch.empty_like(picked)
    starts = rows.cpu() * table.shape[1]
    _write(stream, tensor_id, direction, picked, starts, scale, result, backend)
    return result


def _write(
    stream: CounterStream,
    tensor_id: int,
    direction: int,
    source: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    backend: str | None,
) -> None:
    check_scale(scale)
    _check_dtype(source)
    kernels = kernels_for(source.device, backend)
    source, support = source.detach().contiguous(), stream.support
    if support is not None:
        if not support.moves(tensor_id, torch.tensor([direction])).item():
            out.copy_(source)
            return
        mask = support.mask(tensor_id)
        if mask is not None:  # `out` may be `source`: what stays is taken from there before it is written
            moved, everywhere = torch.empty_like(out), replace(stream, support=None)
            _write(everywhere, tensor_id, direction, source, starts, scale, moved, backend)
            out.copy_(torch.where(_part(mask, starts, source), moved, source))
            return
    if source.dtype in _COMPUTED_AS_ITSELF:
        kernels.perturb(stream, tensor_id, direction, source, starts, scale, out.detach())
    else:
        wide = source.float()
        kernels.perturb(stream, tensor_id, direction, wide, starts, scale, wide)
        out.copy_(wide)


def _part(mask: torch.Tensor, starts: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Bool [pieces, length]: the mask where the pieces of `like` lie, piece p from starts[p]."""
    pieces, length = like.shape
    if pieces == 1:
        first = int(starts[0])
        return mask[None, first : first + length].to(like.device)
    places = starts[:, None] + torch.arange(length)
    return mask[places.to(mask.device)].to(like.device)


def _check_dtype(weights: torch.Tensor) -> None:
    if weights.dtype not in (*_COMPUTED_AS_ITSELF, *_COMPUTED_IN_FLOAT32):
        raise TrainingError(f"weights are {weights.dtype}: only floating-point tensors can be perturbed")
