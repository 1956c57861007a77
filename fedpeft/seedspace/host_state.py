"""A server's global state in NumPy: as `state.SeedState`, where there is nothing but float32 on a CPU.

A server that only counts needs the weights for one thing, the fingerprint of the state that it announces. It
takes no torch for that, which with all that stands on it is several times the rest of a server's memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedpeft.seedspace.layout import CounterStream, Span, tensor_ids

_CHUNK = 2**18  # weights that are summed and rounded at a time: 2 MB of int64
_DTYPE = "torch.float32"  # as `digest` names it


class HostState:
    """theta_0, A, S = sum_k A_k z_k, and the fingerprint of theta_0 + quantum * S.

    Args:
        stream: of directions that move all weights.
        exponent: log2 of the quantum.
        base: float32 theta_0 by canonical name; kept, never written, so a memory map will do.
    """

    def __init__(
        self, stream: CounterStream, num_seeds: int, exponent: int, base: Mapping[str, NDArray[np.float32]]
    ) -> None:
        self._stream, self._quantum = stream, 2.0**exponent
        self._base = {name: base[name] for name in sorted(base)}
        self._ids = tensor_ids(self._base)
        self._amounts = np.zeros(num_seeds, dtype=np.int64)
        self._sums = {name: np.zeros(array.size, dtype=np.int32) for name, array in self._base.items()}

    def fingerprint(self, amounts: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [8]: SHA-256 over names, dtypes, shapes and bits of the weights at these amounts.

        Args:
            amounts: int64 [num_seeds] with a sum of magnitudes below 2^31.
        """
        self._move(amounts)
        digest = hashlib.sha256()
        for name, base in self._base.items():
            head = f"{name}\0{_DTYPE}\0{tuple(base.shape)}\0".encode()
            digest.update(len(head).to_bytes(8, "little") + head)
            flat, sums = base.reshape(-1), self._sums[name]
            for start in range(0, flat.size, _CHUNK):
                window = slice(start, start + _CHUNK)
                digest.update(apply_sums(flat[window], sums[window], self._quantum).data)
        return np.frombuffer(digest.digest(), dtype=">u4").astype(np.int64)

    def _move(self, amounts: NDArray[np.int64]) -> None:
        from fedpeft.seedspace.numba_accumulate import accumulate  # compiled, and few servers need it

        difference = amounts - self._amounts
        changed = np.flatnonzero(difference).astype(np.int64)
        if not changed.size:
            return
        for name, sums in self._sums.items():
            for start in range(0, sums.size, _CHUNK):
                part = sums[start : start + _CHUNK]
                span = Span(self._ids[name], start, start + part.size)
                part += accumulate(self._stream, span, changed, difference[changed], 1).astype(np.int32)
        self._amounts = np.array(amounts)


def apply_sums(base: NDArray[np.float32], sums: NDArray[np.int32], quantum: float) -> NDArray[np.float32]:
    """float32 base + quantum * sums, each weight rounded to nearest-even once; see `rounding.combine`."""
    from fedpeft.seedspace.numba_round import add_exactly

    weights, whole = np.array(base), sums.astype(np.int64)  # an array of its own: kernels take no map
    step = whole * np.float64(quantum)
    out = np.empty_like(weights)
    if add_exactly(weights, whole, quantum, out):
        return _to_odd(weights.astype(np.float64), step).astype(np.float32)
    return out


def _to_odd(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """A + b rounded to odd: where inexact, the neighbour on the exact sum's side whose last bit is set.

    Source: as `rounding`.
    """
    total = a + b
    shadow = total - a
    error = (a - (total - shadow)) + (b - shadow)  # Knuth's TwoSum: exactly (a + b) - total
    bits = total.view(np.int64)
    wrong = (error != 0.0) & np.isfinite(error) & (bits & 1 == 0)
    outwards = ((error > 0.0) == (total > 0.0)) | (total == 0.0)
    bits += np.where(wrong, np.where(outwards, 1, -1), 0)
    return total
