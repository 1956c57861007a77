"""Accumulate: the exact integer sum of signed directions over a range of coordinates."""

import torch

from fedpeft.seedspace.backends import kernels_for
from fedpeft.seedspace.bounds import check_amounts
from fedpeft.seedspace.layout import CounterStream, Span


def accumulate(
    stream: CounterStream,
    span: Span,
    directions: torch.Tensor,
    amounts: torch.Tensor,
    *,
    device: torch.device | str = "cpu",
    backend: str | None = None,
    threads: int = 1,
) -> torch.Tensor:
    """int64 [span.size] on `device`: sum_k amounts[k] * z_k.

    `directions` and `amounts` are int64 [K] on the CPU. Zero amounts cost nothing. The result is the same for
    any order of the pairs, any threads, any backend, and any cut of a tensor into spans.

    Raises: UpdateError when shapes or types are wrong or sum |amounts| reaches 2^53.
    """
    check_amounts(directions, amounts)
    where = torch.device(device)
    kernels, support, mask = kernels_for(where, backend), stream.support, None
    if support is not None:
        moving, mask = support.moves(span.tensor_id, directions), support.mask(span.tensor_id)
        directions, amounts = directions[moving], amounts[moving]
    sums = kernels.accumulate(stream, span, directions.contiguous(), amounts.contiguous(), where, threads)
    return sums if mask is None else sums.mul_(mask[span.start : span.stop].to(where))
