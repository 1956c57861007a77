"""Philox4x32-10 inside Triton programs: each lane computes one block of 128 signs."""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# Triton types arguments at launch; to a type checker a kernel is anything that can be indexed by a grid.
kernel: Callable[[Callable[..., Any]], Any] = triton.jit

ROUNDS = tl.constexpr(10)


@kernel
def sign_words(parameters, direction, blocks):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """Four uint32 words per lane for int64 block offsets `blocks`.

    `parameters` points to int64 [5]: first block, counter words 1, 2, 3, key word 1. They come through memory
    because Triton turns an integer argument that happens to be 1 into a constant of another type.
    """
    first = tl.load(parameters)
    zeros = (blocks * 0).to(tl.uint32)
    x0 = (first + blocks).to(tl.uint32)
    x1 = zeros + tl.load(parameters + 1).to(tl.uint32)
    x2 = zeros + tl.load(parameters + 2).to(tl.uint32)
    x3 = zeros + tl.load(parameters + 3).to(tl.uint32)
    k0 = zeros + direction.to(tl.uint32)
    k1 = zeros + tl.load(parameters + 4).to(tl.uint32)
    m0 = zeros + 0xD2511F53
    m1 = zeros + 0xCD9E8D57
    for _ in tl.static_range(ROUNDS):
        high0 = tl.umulhi(x0, m0)
        high1 = tl.umulhi(x2, m1)
        low0 = x0 * m0
        low1 = x2 * m1
        x0 = high1 ^ x1 ^ k0
        x2 = high0 ^ x3 ^ k1
        x1 = low1
        x3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return x0, x1, x2, x3


@kernel
def load_signs(word, value):  # type: ignore[no-untyped-def]  # Triton types its own arguments
    """[lanes, 32]: +value where the lane's bit is set, -value elsewhere."""
    bits = (word[:, None] >> tl.arange(0, 32)[None, :].to(tl.uint32)) & 1
    return tl.where(bits != 0, value, -value)
