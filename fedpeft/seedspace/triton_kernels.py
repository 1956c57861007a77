"""The three kernels for CUDA, in Triton: the same integers as on the CPU, so the same bits.

Nothing here depends on launch geometry: each lane derives its block from the coordinate, sums are integers,
and the only atomic addition is of integers too.
"""

import torch
import triton
import triton.language as tl

from fedpeft.seedspace.layout import BLOCK, CounterStream, Span
from fedpeft.seedspace.triton_signs import kernel, load_signs, sign_words

LANES = 32  # blocks per program: 4096 coordinates, 32 accumulators per thread of a 128-thread program
NARROW_LIMIT = 2**31 - 1


@kernel
def _accumulate(  # type: ignore[no-untyped-def]  # Triton types its own arguments
    out,
    parameters,
    directions,
    amounts,
    count,
    blocks,
    lanes: tl.constexpr,
    wide: tl.constexpr,
):
    """out[128 b + i] = sum_k amounts[k] z_k, in 32-bit registers unless `wide`."""
    kind: tl.constexpr = tl.int64 if wide else tl.int32
    offsets = tl.program_id(0).to(tl.int64) * lanes + tl.arange(0, lanes)
    s0 = tl.zeros((lanes, 32), dtype=kind)
    s1 = tl.zeros((lanes, 32), dtype=kind)
    s2 = tl.zeros((lanes, 32), dtype=kind)
    s3 = tl.zeros((lanes, 32), dtype=kind)
    for k in range(count):
        amount = tl.load(amounts + k).to(kind)
        w0, w1, w2, w3 = sign_words(parameters, tl.load(directions + k), offsets)
        s0 += load_signs(w0, amount)
        s1 += load_signs(w1, amount)
        s2 += load_signs(w2, amount)
        s3 += load_signs(w3, amount)
    inside = (offsets < blocks)[:, None]
    target = out + offsets[:, None] * 128 + tl.arange(0, 32)[None, :]
    tl.store(target, s0.to(tl.int64), mask=inside)
    tl.store(target + 32, s1.to(tl.int64), mask=inside)
    tl.store(target + 64, s2.to(tl.int64), mask=inside)
    tl.store(target + 96, s3.to(tl.int64), mask=inside)


@kernel
def _project(  # type: ignore[no-untyped-def]  # Triton types its own arguments
    out,
    parameters,
    directions,
    delta,
    count,
    blocks,
    lanes: tl.constexpr,
    wide: tl.constexpr,
):
    """out[k] += <delta, z_k> over this program's blocks."""
    kind: tl.constexpr = tl.int64 if wide else tl.int32
    offsets = tl.program_id(0).to(tl.int64) * lanes + tl.arange(0, lanes)
    inside = (offsets < blocks)[:, None]
    source = delta + offsets[:, None] * 128 + tl.arange(0, 32)[None, :]
    d0 = tl.load(source, mask=inside, other=0).to(kind)
    d1 = tl.load(source + 32, mask=inside, other=0).to(kind)
    d2 = tl.load(source + 64, mask=inside, other=0).to(kind)
    d3 = tl.load(source + 96, mask=inside, other=0).to(kind)
    for k in range(count):
        w0, w1, w2, w3 = sign_words(parameters, tl.load(directions + k), offsets)
        products = load_signs(w0, d0) + load_signs(w1, d1) + load_signs(w2, d2) + load_signs(w3, d3)
        tl.atomic_add(out + k, tl.sum(tl.sum(products, axis=1), axis=0).to(tl.int64))


@kernel
def _perturb(  # type: ignore[no-untyped-def]  # Triton types its own arguments
    source,
    out,
    starts,
    parameters,
    direction,
    scale,
    length,
    lanes: tl.constexpr,
):
    """out[p, i] = source[p, i] + scale z[starts[p] + i] for one piece p and `lanes` of its blocks."""
    piece = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + piece)
    offsets = start // 128 + tl.program_id(1).to(tl.int64) * lanes + tl.arange(0, lanes)
    w0, w1, w2, w3 = sign_words(parameters, tl.load(direction), offsets)
    amount = tl.load(scale)
    columns = tl.arange(0, 32)[None, :]
    base = offsets[:, None] * 128 + columns - start
    for word in tl.static_range(4):
        bits = w0 if word == 0 else (w1 if word == 1 else (w2 if word == 2 else w3))
        place = base + 32 * word
        inside = (place >= 0) & (place < length)
        before = tl.load(source + piece * length + place, mask=inside, other=0)
        tl.store(out + piece * length + place, before + load_signs(bits, amount), mask=inside)


def accumulate(
    stream: CounterStream,
    span: Span,
    directions: torch.Tensor,
    amounts: torch.Tensor,
    device: torch.device,
    threads: int,
) -> torch.Tensor:
    """int64 [span.size] on `device`: sum_k amounts[k] * z_k; `threads` is the card's own affair."""
    del threads
    used = amounts != 0
    total = sum(map(abs, amounts.tolist()))
    out = torch.empty(span.num_blocks * BLOCK, dtype=torch.int64, device=device)
    if span.size:
        _accumulate[(triton.cdiv(span.num_blocks, LANES),)](
            out, _parameters(stream, span.tensor_id, span.first_block, device), directions[used].to(device),
            amounts[used].to(device), int(used.sum()), span.num_blocks, lanes=LANES, wide=total >
            NARROW_LIMIT, enable_fp_fusion=False,
        )  # fmt: skip
    return out[span.offset : span.offset + span.size]


def project(
    stream: CounterStream, span: Span, directions: torch.Tensor, delta: torch.Tensor, threads: int
) -> torch.Tensor:
    """int64 [K] on the CPU: <delta, z_k> over the span."""
    del threads
    device = delta.device
    out = torch.zeros(len(directions), dtype=torch.int64, device=device)
    if span.size:
        padded = torch.zeros(span.num_blocks * BLOCK, dtype=torch.int64, device=device)
        padded[span.offset : span.offset + span.size] = delta
        largest = int(delta.abs().max())
        _project[(triton.cdiv(span.num_blocks, LANES),)](
            out, _parameters(stream, span.tensor_id, span.first_block, device), directions.to(device), padded,
            len(directions), span.num_blocks, lanes=LANES, wide=largest * LANES * BLOCK > NARROW_LIMIT,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out.cpu()


def perturb(
    stream: CounterStream,
    tensor_id: int,
    direction: int,
    source: torch.Tensor,
    starts: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Writes source + scale * z to `out`, both float32 or float64 [pieces, length] and contiguous."""
    pieces, length = source.shape
    if not source.numel():
        return
    device = source.device
    blocks = triton.cdiv(length + BLOCK - 1, BLOCK)
    _perturb[(pieces, triton.cdiv(blocks, LANES))](
        source, out, starts.to(device), _parameters(stream, tensor_id, 0, device),
        torch.tensor([direction], dtype=torch.int64, device=device),
        torch.tensor([scale], dtype=source.dtype, device=device), length, lanes=LANES,
        enable_fp_fusion=False,
    )  # fmt: skip


def _parameters(
    stream: CounterStream, tensor_id: int, first_block: int, device: torch.device
) -> torch.Tensor:
    words = (first_block, *stream.counter_words(tensor_id), stream.key_word)
    return torch.tensor(words, dtype=torch.int64, device=device)
