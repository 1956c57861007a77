"""Perturb: weights plus a scaled direction, into a buffer, for any coordinates of a tensor."""

import torch

from fedpeft.errors import TrainingError
from fedpeft.seedspace.backends import kernels_for
from fedpeft.seedspace.bounds import check_scale
from fedpeft.seedspace.layout import Stream

_COMPUTED_AS_ITSELF = (torch.float32, torch.float64)
_COMPUTED_IN_FLOAT32 = (torch.float16, torch.bfloat16)


def perturb(
    stream: Stream,
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


def perturb_rows(
    stream: Stream,
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
    picked = table.detach()[rows]
    result = torch.empty_like(picked)
    starts = rows.cpu() * table.shape[1]
    _write(stream, tensor_id, direction, picked, starts, scale, result, backend)
    return result


def _write(
    stream: Stream,
    tensor_id: int,
    direction: int,
    source: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    backend: str | None,
) -> None:
    check_scale(scale)
    kernels = kernels_for(source.device, backend)
    source = source.detach().contiguous()
    if source.dtype in _COMPUTED_AS_ITSELF:
        kernels.perturb(stream, tensor_id, direction, source, starts, scale, out.detach())
    elif source.dtype in _COMPUTED_IN_FLOAT32:
        wide = source.float()
        kernels.perturb(stream, tensor_id, direction, wide, starts, scale, wide)
        out.copy_(wide)
    else:
        raise TrainingError(f"weights are {source.dtype}: only floating-point tensors can be perturbed")
