"""Sums that do not depend on the order in which they are made.

Float addition is not associative, and replies arrive in any order. So updates are folded into int64 multiples
of a power of two, the quantum, and converted once when the round closes: the same replies give the same bits,
whoever came first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.update import Arrays, Layout, Update, check_layout

BLOCK = 1 << 14  # entries; 128 KiB of float64 stay in the second-level cache
HEADROOM_BITS = 62  # of int64's 63: one bit stays free so that the sum of all bounds can't wrap


@dataclass(frozen=True)
class _Span:
    """Where an array lies in the flat sum."""

    name: str
    shape: tuple[int, ...]
    start: int
    end: int


class ExactSum:
    """The weighted sum of updates of one layout, exact in units of ``2**quantum_exponent``.

    Every update may use an equal share of the integer range, ``2**62 / capacity``; one that needs more is
    refused, so `capacity` updates can never overflow whatever they hold. With the default quantum of 2**-36
    and a cohort of 1,000, weight times entry may reach 67,000.

    Args:
        layout: names, shapes and dtypes of the arrays: all floats, or all integers, whose quantum is 1.
        quantum_exponent: log2 of the unit in which float entries are counted.
        capacity: the most updates that will be folded.
    """

    def __init__(self, layout: Layout, *, quantum_exponent: int, capacity: int) -> None:
        kinds = {np.dtype(dtype).kind for _, dtype in layout.values()}
        if len(kinds) > 1:
            raise UpdateError("floats and integers in one update cannot be summed exactly; send one kind")
        self._layout = layout
        self._exponent = 0 if kinds == {"i"} else quantum_exponent
        self._bound = 2**HEADROOM_BITS // max(capacity, 1)
        self._room = capacity
        self._spans = _spans(layout)
        size = self._spans[-1].end if self._spans else 0
        self._sum = np.zeros(size, dtype=np.int64)
        self._scratch = np.zeros(size, dtype=np.int64 if kinds == {"i"} else np.float64)
        self.total_weight = 0
        self.count = 0

    def fold(self, update: Update, *, who: str = "the update") -> float:
        """Add one update, all of it or nothing; returns its L2 norm.

        Raises:
            UpdateError: wrong layout, a weight below 1 or beyond the sum's room, NaN or infinity, one update
                too many, or an entry too large for the exact sum.
        """
        check_layout(update.arrays, self._layout, who=who)
        if update.weight < 1:
            raise UpdateError(f"{who}: weight {update.weight} came, at least 1 is needed")
        if update.weight > self._bound:
            raise UpdateError(f"{who}: weight {update.weight} came, the exact sum has room for {self._bound}")
        if self._room <= 0:
            raise UpdateError(f"{who}: the round's cohort is complete; one more update cannot be counted")
        norm = self._load(update, who)
        self._check(norm, update, who)
        self._add(update.weight)
        self._room -= 1
        self.total_weight += update.weight
        self.count += 1
        return math.ldexp(norm, self._exponent)

    def _load(self, update: Update, who: str) -> float:
        """Put the entries into the scratch buffer, in quanta; returns their L2 norm.

        Raises:
            UpdateError: NaN or infinity.
        """
        flat, scale = self._scratch, 2.0**-self._exponent  # scaling by a power of two is exact
        for span in self._spans:
            part, source = flat[span.start : span.end], update.arrays[span.name].reshape(-1)
            if flat.dtype.kind == "f":
                np.multiply(source, scale, out=part, dtype=np.float64)
            else:
                part[:] = source
        norm = math.sqrt(sum(_squared(block) for block in _blocks(flat)))
        if not math.isfinite(norm):
            bad = [name for name, array in update.arrays.items() if not np.isfinite(array).all()]
            what = f"array {bad[0]!r} holds NaN or infinity" if bad else "its norm is beyond float64"
            raise UpdateError(f"{who}: {what}; nothing of it was counted")
        return norm

    def _check(self, norm: float, update: Update, who: str) -> None:
        """Refuse entries that don't fit; none exceeds the norm, so the largest is seldom looked for."""
        if norm * update.weight <= self._bound / 2 or not self._scratch.size:
            return
        reach = (max(-int(self._scratch.min()), int(self._scratch.max())) + 1) * update.weight
        if reach > self._bound:
            raise UpdateError(
                f"{who}: an entry times its weight reaches 2^{math.log2(reach):.1f} quanta and the exact sum"
                f" has room for 2^{math.log2(self._bound):.1f}; clip the update or raise"
                " federation.quantum_exponent"
            )

    def _add(self, weight: int) -> None:
        """Round the scratch buffer to whole quanta and add it, block by block so that each stays in cache."""
        for total, block in zip(_blocks(self._sum), _blocks(self._scratch), strict=True):
            if block.dtype.kind == "f":
                np.rint(block, out=block)
            term = block.astype(np.int64)
            term *= weight
            total += term

    def sums(self) -> Arrays:
        """The integer sums themselves (int64, in quanta), as views."""
        return {span.name: self._sum[span.start : span.end].reshape(span.shape) for span in self._spans}

    def mean(self) -> dict[str, NDArray[np.float64]]:
        """Weighted mean as float64: one conversion and one division per entry.

        Raises:
            UpdateError: nothing was folded.
        """
        if not self.count:
            raise UpdateError("no update was counted: a mean needs at least one")
        flat = np.ldexp(self._sum.astype(np.float64), self._exponent) / self.total_weight
        return {span.name: flat[span.start : span.end].reshape(span.shape) for span in self._spans}


def _squared(block: NDArray[Any]) -> float:
    return float(np.einsum("i,i->", block, block, dtype=np.float64))


def _blocks(flat: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (flat[start : start + BLOCK] for start in range(0, flat.size, BLOCK))


def _spans(layout: Layout) -> list[_Span]:
    spans, start = [], 0
    for name, (shape, _) in layout.items():
        end = start + math.prod(shape)
        spans.append(_Span(name, shape, start, end))
        start = end
    return spans
