"""Sums that do not depend on the order in which they are made.

Float addition is not associative, and replies arrive in any order. So updates are folded into int64 multiples
of a power of two, the quantum, and converted once when the round closes: the same replies give the same bits,
whoever came first.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.update import Arrays, Layout, Update, check_layout

HEADROOM_BITS = 62  # of int64's 63: one bit stays free so that the sum of all bounds can't wrap


class ExactSum:
    """The weighted sum of updates of one layout, exact in units of ``2**quantum_exponent``.

    Every update may use an equal share of the integer range, ``2**62 / capacity``; one that needs more is
    refused, so `capacity` updates can never overflow whatever they hold. With the default quantum of 2**-36
    and a cohort of 1,000, weight times entry may reach 67,000.

    Args:
        layout: names, shapes and dtypes of the arrays (float32, or int64 for exact quantities, whose quantum
            is 1).
        quantum_exponent: log2 of the unit in which float entries are counted.
        capacity: the most updates that will be folded.
    """

    def __init__(self, layout: Layout, *, quantum_exponent: int, capacity: int) -> None:
        self._layout = layout
        self._exponent = quantum_exponent
        self._bound = math.floor(2**HEADROOM_BITS / max(capacity, 1))
        self._room = capacity
        self._sums = {name: np.zeros(shape, dtype=np.int64) for name, (shape, _) in layout.items()}
        self.total_weight = 0
        self.count = 0

    def fold(self, update: Update, *, who: str = "the update") -> None:
        """Add one update, all of it or nothing.

        Raises:
            UpdateError: wrong layout, a weight below 1, NaN or infinity, or an entry too large for the exact
                sum.
        """
        check_layout(update.arrays, self._layout, who=who)
        if update.weight < 1:
            raise UpdateError(f"{who}: weight {update.weight} came, at least 1 is needed")
        if self._room <= 0:
            raise UpdateError(f"{who}: the round's cohort is complete; one more update cannot be counted")
        terms = {name: self._term(name, array, update.weight, who) for name, array in update.arrays.items()}
        for name, term in terms.items():
            self._sums[name] += term
        self._room -= 1
        self.total_weight += update.weight
        self.count += 1

    def _term(self, name: str, array: NDArray[Any], weight: int, who: str) -> NDArray[np.int64]:
        """Weight * round(array / quantum) as int64, after the bound was checked."""
        if array.dtype.kind in "iu":
            largest = int(np.abs(array.astype(object)).max()) if array.size else 0
            self._check(largest * weight, name, who)
            return array.astype(np.int64) * weight
        scaled = array.astype(np.float64)
        scaled *= 2.0**-self._exponent  # exact: a power of two
        peak = max(float(scaled.max()), -float(scaled.min())) if array.size else 0.0  # NaN comes through
        if not math.isfinite(peak):
            raise UpdateError(f"{who}: array {name!r} holds NaN or infinity; nothing of it was counted")
        self._check(int(peak) * weight, name, who)
        np.rint(scaled, out=scaled)
        term: NDArray[np.int64] = scaled.astype(np.int64)
        term *= weight
        return term

    def _check(self, magnitude: int, name: str, who: str) -> None:
        if magnitude > self._bound:
            raise UpdateError(
                f"{who}: array {name!r} times its weight reaches 2^{math.log2(magnitude):.1f} quanta, the"
                " exact sum has"
                f" room for 2^{math.log2(self._bound):.1f}; clip the update or raise"
                " federation.quantum_exponent"
            )

    def sums(self) -> Arrays:
        """The integer sums themselves (int64, in quanta)."""
        return self._sums

    def mean(self) -> dict[str, NDArray[np.float64]]:
        """Weighted mean as float64: one conversion and one division per entry.

        Raises:
            UpdateError: nothing was folded.
        """
        if not self.count:
            raise UpdateError("no update was counted: a mean needs at least one")
        result = {}
        for name, (_, dtype) in self._layout.items():
            exponent = 0 if np.dtype(dtype).kind in "iu" else self._exponent
            result[name] = np.ldexp(self._sums[name].astype(np.float64), exponent) / self.total_weight
        return result
