"""The three kernels in plain torch, for any device: the fallback, and a second opinion."""

import torch

from fedpeft.seedspace.layout import BLOCK, CounterStream, Span
from fedpeft.seedspace.torch_signs import torch_signs

TILE_BLOCKS = 1024


def accumulate(
    stream: CounterStream,
    span: Span,
    directions: torch.Tensor,
    amounts: torch.Tensor,
    device: torch.device,
    threads: int,
) -> torch.Tensor:
    """int64 [span.size]: sum_k amounts[k] * z_k; `threads` is torch's own affair here."""
    del threads
    out = torch.zeros(span.num_blocks * BLOCK, dtype=torch.int64, device=device)
    pairs = [(k, a) for k, a in zip(directions.tolist(), amounts.tolist(), strict=True) if a]
    for begin, blocks in _tiles(span, device):
        part = out[begin * BLOCK : (begin + len(blocks)) * BLOCK]
        for direction, amount in pairs:
            part.add_(torch_signs(stream, span.tensor_id, direction, blocks), alpha=amount)
    return out[span.offset : span.offset + span.size]


def project(
    stream: CounterStream, span: Span, directions: torch.Tensor, delta: torch.Tensor, threads: int
) -> torch.Tensor:
    """int64 [K] on the CPU: <delta, z_k> over the span."""
    del threads
    padded = torch.zeros(span.num_blocks * BLOCK, dtype=torch.int64, device=delta.device)
    padded[span.offset : span.offset + span.size] = delta
    result = torch.zeros(len(directions), dtype=torch.int64, device=delta.device)
    for begin, blocks in _tiles(span, delta.device):
        part = padded[begin * BLOCK : (begin + len(blocks)) * BLOCK]
        for k, direction in enumerate(directions.tolist()):
            result[k] += (part * torch_signs(stream, span.tensor_id, direction, blocks)).sum()
    return result.cpu()


def perturb(
    stream: CounterStream,
    tensor_id: int,
    direction: int,
    source: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Writes source + scale * z to `out`, both [pieces, length]; piece p begins at coordinate starts[p]."""
    pieces, length = source.shape
    if not source.numel():
        return
    starts = starts.to(source.device)
    width = (length + BLOCK - 2) // BLOCK + 1  # blocks that a piece can touch wherever it begins
    per_tile = max(1, TILE_BLOCKS // width)
    for first in range(0, pieces, per_tile):
        begin = starts[first : first + per_tile]
        blocks = (begin // BLOCK)[:, None] + torch.arange(width, device=source.device)
        signs = torch_signs(stream, tensor_id, direction, blocks)
        where = (begin % BLOCK)[:, None] + torch.arange(length, device=source.device)
        signed = signs.gather(1, where).to(source.dtype) * scale
        torch.add(source[first : first + per_tile], signed, out=out[first : first + per_tile])


def _tiles(span: Span, device: torch.device) -> list[tuple[int, torch.Tensor]]:
    """Pairs of (first block within the span, block numbers) that cover the span."""
    numbers = torch.arange(span.first_block, span.first_block + span.num_blocks, device=device)
    return [(begin, numbers[begin : begin + TILE_BLOCKS]) for begin in range(0, span.num_blocks, TILE_BLOCKS)]
