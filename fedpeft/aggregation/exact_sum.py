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
from fedpeft.runtime.jit import compile_function
from fedpeft.updates.packed import PackedArrays, pack, packable, packing_of
from fedpeft.updates.update import Layout, Update, check_layout

_LANES = 512  # sums that are made side by side
HEADROOM_BITS = 62  # of int64's 63: one bit stays free so that the sum of all bounds can't wrap


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
        if not packable(layout):
            raise UpdateError("floats and integers in one update cannot be summed exactly; send one kind")
        self._packing = packing_of(layout)
        self._exact = self._packing.dtype.kind == "i"
        self._exponent = 0 if self._exact else quantum_exponent
        self._bound = 2**HEADROOM_BITS // max(capacity, 1)
        self._room = capacity
        self._sum = np.zeros(self._packing.size, dtype=np.int64)
        self.total_weight = 0
        self.count = 0

    def fold(self, update: Update, *, who: str = "the update") -> float:
        """Add one update, all of it or nothing; returns its L2 norm.

        Raises:
            UpdateError: wrong layout, a weight below 1 or beyond the sum's room, NaN or infinity, one update
                too many, or an entry too large for the exact sum.
        """
        check_layout(update.arrays, self._packing, who=who)
        if update.weight < 1:
            raise UpdateError(f"{who}: weight {update.weight} came, at least 1 is needed")
        if update.weight > self._bound:
            raise UpdateError(f"{who}: weight {update.weight} came, the exact sum has room for {self._bound}")
        if self._room <= 0:
            raise UpdateError(f"{who}: the round's cohort is complete; one more update cannot be counted")
        entries = pack(update.arrays, self._packing).flat
        squares = (self._add_integers if self._exact else self._add_floats)(entries, update, who)
        self._room -= 1
        self.total_weight += update.weight
        self.count += 1
        return math.sqrt(squares)

    def _add_integers(self, entries: NDArray[np.int64], update: Update, who: str) -> float:
        largest, squares = _integer_extent(entries)
        self._check_entries(largest, update, who)
        self._sum += entries * update.weight
        return squares

    def _add_floats(self, entries: NDArray[np.float32], update: Update, who: str) -> float:
        """Add and look at once, in one pass over memory; what must be refused is taken back, exactly."""
        terms = entries, 2.0**-self._exponent, float(self._bound // update.weight)
        largest, squares = _add_quanta(self._sum, *terms, update.weight)
        try:
            self._check_entries(largest, update, who)
        except UpdateError:
            _add_quanta(self._sum, *terms, -update.weight)
            raise
        return squares

    def _check_entries(self, largest: float, update: Update, who: str) -> None:
        """Refuse entries that are not finite or don't fit."""
        if not math.isfinite(largest):
            bad = next(name for name, array in update.arrays.items() if not np.isfinite(array).all())
            raise UpdateError(f"{who}: array {bad!r} holds NaN or infinity; nothing of it was counted")
        quanta = int(largest) if self._exact else int(math.ldexp(largest, -self._exponent)) + 1
        reach = quanta * update.weight
        if reach > self._bound:
            raise UpdateError(
                f"{who}: an entry times its weight reaches 2^{math.log2(reach):.1f} quanta and the exact sum"
                f" has room for 2^{math.log2(self._bound):.1f}; clip the update or raise"
                " federation.quantum_exponent"
            )

    def sums(self) -> PackedArrays:
        """The integer sums themselves (int64, in quanta), as views."""
        return PackedArrays(self._sum, self._packing.like("<i8"))

    def mean(self) -> PackedArrays:
        """Weighted mean as float64: one conversion and one division per entry.

        Raises:
            UpdateError: nothing was folded.
        """
        if not self.count:
            raise UpdateError("no update was counted: a mean needs at least one")
        flat = _quotients(self._sum, 2.0**self._exponent, float(self.total_weight))
        return PackedArrays(flat, self._packing.like("<f8"))


def prepare_sums() -> None:
    """Load the compiled code of sums now, a second or so, rather than with a round's first update."""
    entries = np.zeros(1, dtype=np.float32)
    for flat in (
        entries,
        np.frombuffer(entries.tobytes(), dtype=np.float32),
    ):  # the second: as it is received
        _add_quanta(np.zeros(1, dtype=np.int64), flat, 1.0, 1.0, 1)
    add_change(entries, _quotients(np.zeros(1, dtype=np.int64), 1.0, 1.0))


def norm_of(entries: NDArray[Any]) -> float:
    """The L2 norm of contiguous entries, summed in float64 and in one fixed order."""
    return math.sqrt(_extent(entries)[1])


@compile_function
def add_change(start: NDArray[np.float32], change: NDArray[np.float64]) -> NDArray[np.float32]:
    """Start plus change, added in float64 and rounded once."""
    result = np.empty(start.size, dtype=np.float32)
    for i in range(start.size):
        result[i] = np.float32(np.float64(start[i]) + change[i])
    return result


@compile_function
def _add_quanta(
    total: NDArray[np.int64],
    entries: NDArray[np.float32],
    quanta_per_one: float,
    most: float,
    weight: int,
) -> tuple[float, float]:
    """Add weight * round(entry / quantum), and return what `_extent` does of the entries.

    The product with a power of two is exact, ties go to even. More than `most` quanta (and NaN) count as
    `most`, so that nothing overflows and a second call with -weight undoes the first one.
    """
    squares, peaks = np.zeros(_LANES), np.zeros(_LANES)
    for row in range(-(-entries.size // _LANES)):
        first = row * _LANES
        for lane in range(min(_LANES, entries.size - first)):
            entry = np.float64(entries[first + lane])
            squares[lane] += entry * entry
            peaks[lane] = abs(entry) if abs(entry) > peaks[lane] else peaks[lane]
            quanta = np.rint(entry * quanta_per_one)
            quanta = quanta if quanta < most else most
            total[first + lane] += np.int64(quanta if quanta > -most else -most) * weight
    squared = squares.sum()
    return (squared if np.isnan(squared) else peaks.max()), squared


@compile_function
def _quotients(total: NDArray[np.int64], quantum: float, weight: float) -> NDArray[np.float64]:
    """Sums divided by the weight; the product with a power of two, far from both ends, is exact."""
    result = np.empty(total.size, dtype=np.float64)
    for i in range(total.size):
        result[i] = np.float64(total[i]) * quantum / weight
    return result


def _integer_extent(entries: NDArray[np.int64]) -> tuple[int, float]:
    """Largest magnitude, exactly, which a float could not hold; and the sum of squares."""
    largest = max(int(entries.max()), -int(entries.min())) if entries.size else 0
    return largest, _extent(entries)[1]


@compile_function
def _extent(entries: NDArray[Any]) -> tuple[float, float]:
    """Largest magnitude (NaN if any entry is) and the sum of squares, in float64 and in one fixed order.

    Sums and maxima side by side, since one of each would wait for every entry in turn.
    """
    squares, peaks = np.zeros(_LANES), np.zeros(_LANES)
    for row in range(entries.size // _LANES):
        for lane in range(_LANES):
            size = abs(np.float64(entries[row * _LANES + lane]))
            squares[lane] += size * size
            peaks[lane] = size if size > peaks[lane] else peaks[lane]
    for place in range(entries.size // _LANES * _LANES, entries.size):
        size = abs(np.float64(entries[place]))
        squares[0] += size * size
        peaks[0] = size if size > peaks[0] else peaks[0]
    total = squares.sum()
    return (total if np.isnan(total) else peaks.max()), total
