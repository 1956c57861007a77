"""Signs and weights of an exact seed space from its definition: unbounded integers, fractions, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

_M0, _M1, _W0, _W1, _MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 2**32 - 1


def _philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    for turn in range(10):
        high0, low0 = divmod(_M0 * c0, 2**32)
        high1, low1 = divmod(_M1 * c2, 2**32)
        k0, k1 = (key[0] + turn * _W0) & _MASK, (key[1] + turn * _W1) & _MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def sign(seed: int, tensor_id: int, direction: int, place: int) -> int:
    """One coordinate of one direction: +1 or -1."""
    words = _philox((place // 128, seed // 2**32, tensor_id, 0), (direction, seed % 2**32))
    return 1 if words[place // 32 % 4] // 2 ** (place % 32) % 2 else -1


def weight(
    start: float, amounts: Sequence[int], exponent: int, *, seed: int, tensor_id: int, place: int
) -> np.float32:
    """theta_0 + 2**exponent * sum_k A_k z_k of one coordinate, rounded once to float32."""
    total = sum(a * sign(seed, tensor_id, k, place) for k, a in enumerate(amounts) if a)
    exact = Fraction(start) + total * Fraction(2) ** exponent
    near = np.float32(float(exact))  # may have been rounded twice: look at the neighbours
    candidates = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return min(
        candidates, key=lambda value: (abs(Fraction(float(value)) - exact), int(value.view(np.int32)) & 1)
    )
