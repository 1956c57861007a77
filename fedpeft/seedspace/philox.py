"""Philox4x32-10, the counter-based generator behind every direction, in NumPy and in torch.

A counter-based generator is a function, not a state: 128 bits of output from a 128-bit counter and a 64-bit
key. Any block of any direction is computed on its own, on any machine, in any order.

Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011), and the
known-answer vectors of Random123. The torch version needs signed 64-bit integers only, so it runs wherever
torch does.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.seedspace.philox_constants import MULTIPLIERS, ROUNDS, WEYL

LOW_32 = 0xFFFFFFFF


def philox_numpy(
    counter: Sequence[NDArray[np.uint64] | int], key: Sequence[NDArray[np.uint64] | int], rounds: int = ROUNDS
) -> tuple[NDArray[np.uint64], ...]:
    """Four output words, uint64 below 2^32, of broadcastable `counter` (4) and `key` (2) words."""
    x0, x1, x2, x3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = (np.asarray(word, dtype=np.uint64) for word in key)
    low, half = np.uint64(LOW_32), np.uint64(32)
    for _ in range(rounds):
        # 32 x 32 bits fit in 64: the high half is a shift, the low half a mask.
        p0, p1 = x0 * np.uint64(MULTIPLIERS[0]), x2 * np.uint64(MULTIPLIERS[1])
        x0, x1, x2, x3 = (p1 >> half) ^ x1 ^ k0, p1 & low, (p0 >> half) ^ x3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(WEYL[0])) & low, (k1 + np.uint64(WEYL[1])) & low
    return x0, x1, x2, x3


def philox_torch(
    counter: Sequence[torch.Tensor | int],
    key: Sequence[torch.Tensor | int],
    rounds: int = ROUNDS,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, ...]:
    """Four output words, int64 in [0, 2^32) on `device`; the words of `counter` and `key` broadcast."""
    x0, x1, x2, x3 = (torch.as_tensor(word, dtype=torch.int64, device=device) for word in counter)
    k0, k1 = (torch.as_tensor(word, dtype=torch.int64, device=device) for word in key)
    for _ in range(rounds):
        # The product wraps modulo 2^64 and the shift is arithmetic: masking after the shift gives both
        # halves.
        p0, p1 = x0 * MULTIPLIERS[0], x2 * MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((p1 >> 32) & LOW_32) ^ x1 ^ k0,
            p1 & LOW_32,
            ((p0 >> 32) & LOW_32) ^ x3 ^ k1,
            p0 & LOW_32,
        )
        k0, k1 = (k0 + WEYL[0]) & LOW_32, (k1 + WEYL[1]) & LOW_32
    return x0, x1, x2, x3
