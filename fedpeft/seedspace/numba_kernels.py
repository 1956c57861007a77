"""The compiled CPU kernels behind torch tensors."""

import numpy as np
import torch

from fedpeft.seedspace import numba_accumulate, numba_perturb, numba_project
from fedpeft.seedspace.backends import Shift
from fedpeft.seedspace.layout import CounterStream, Span


def accumulate(
    stream: CounterStream,
    span: Span,
    directions: torch.Tensor,
    amounts: torch.Tensor,
    device: torch.device,
    threads: int,
) -> torch.Tensor:
    """int64 [span.size]: sum_k amounts[k] * z_k."""
    sums = numba_accumulate.accumulate(stream, span, directions.numpy(), amounts.numpy(), threads)
    return torch.from_numpy(sums).to(device)


def project(
    stream: CounterStream, span: Span, directions: torch.Tensor, delta: torch.Tensor, threads: int
) -> torch.Tensor:
    """int64 [K]: <delta, z_k> over the span."""
    return torch.from_numpy(
        numba_project.project(stream, span, directions.numpy(), delta.cpu().numpy(), threads)
    )


def perturb(
    stream: CounterStream,
    tensor_id: int,
    direction: int,
    source: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Writes source + scale * z to `out`, both float32 or float64 [pieces, length]."""
    numba_perturb.perturb(stream, tensor_id, direction, source.numpy(), starts.numpy(), scale, out.numpy())


def prepare(stream: CounterStream, tensor_id: int, source: torch.Tensor, start: int) -> Shift:
    """As `perturb` for one piece, with everything worked out that depends on neither direction nor scale."""
    shift = numba_perturb.prepare(stream, tensor_id, source.view(1, -1).numpy(), np.array([start]))
    return lambda direction, scale, out: shift(direction, scale, out.view(1, -1).numpy())
