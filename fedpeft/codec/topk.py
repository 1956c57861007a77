"""Selection of the k largest magnitudes in O(d), under one total order on every machine."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedpeft.codec.arrays import Float32Array, Int8Array, Int32Array, flat_float32
from fedpeft.errors import UpdateError
from fedpeft.runtime.jit import compile_function

# Positive IEEE floats sort like their bit patterns, so all selection is done on integers.
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_SIGN_SHIFT = np.uint32(31)
# 8 exponent and 4 mantissa bits: 4096 counters stay in the first-level cache.
_BIN_SHIFT = np.uint32(19)
_BINS = 4096
_FIRST_NON_FINITE_BIN = 0x7F800000 >> 19


@dataclass(frozen=True)
class Cut:
    """Where the kept entries end: all magnitudes above `threshold_bits`, and the first `ties` equal to it."""

    threshold_bits: int
    ties: int


@dataclass(frozen=True)
class Moments:
    """Mean, population standard deviation and root mean square of a whole tensor, in float64."""

    mean: float
    std: float
    rms: float


def count_selected(size: int, density: float) -> int:
    """Entries kept of `size` at `density` in [0, 1]: rounded half up, at least one when both are positive.

    Raises UpdateError when `density` is outside [0, 1].
    """
    if not 0.0 <= density <= 1.0:
        raise UpdateError(f"density {density}: a fraction from 0 to 1 is needed")
    if size == 0 or density == 0.0:
        return 0
    return min(size, max(1, math.floor(density * size + 0.5)))


def find_cut(flat: Float32Array, count: int) -> Cut:
    """The cut that keeps exactly `count` entries of `flat` by (magnitude descending, index ascending).

    A histogram of the leading magnitude bits finds the bin that holds the count-th magnitude; only that bin
    is partitioned. Both zeros have magnitude 0. `flat` is a contiguous float32 vector, 0 <= count <= its
    size.

    Raises:
        UpdateError: a value is NaN or infinite, or `count` is out of range.
    """
    if not 0 <= count <= flat.size:
        raise UpdateError(f"top-k of {count} entries out of {flat.size}: ask for at most the size")
    bits = flat.view(np.uint32)
    histogram = np.zeros(_BINS, dtype=np.int64)
    _count_bins(bits, histogram)
    if histogram[_FIRST_NON_FINITE_BIN:].any():
        raise UpdateError("a delta holds NaN or infinity: drop the update or lower the learning rate")
    if count == 0:
        return Cut(int(_MAGNITUDE), 0)
    at_least = np.cumsum(histogram[::-1])[::-1]
    cut_bin = int(np.flatnonzero(at_least >= count)[-1])
    inside = int(histogram[cut_bin])
    needed = count - (int(at_least[cut_bin]) - inside)
    candidates = np.empty(inside + 1, dtype=np.uint32)
    _gather_bin(bits, np.uint32(cut_bin), candidates)
    return _cut_among(candidates[:inside], needed)


def _cut_among(candidates: npt.NDArray[np.uint32], needed: int) -> Cut:
    threshold = np.partition(candidates, candidates.size - needed)[candidates.size - needed]
    above = int(np.count_nonzero(candidates > threshold))
    return Cut(int(threshold), needed - above)


def top_k_indices(delta: npt.NDArray[np.floating], count: int) -> Int32Array:
    """Flat indices, ascending, of the `count` largest magnitudes; ties go to the smaller index.

    Source: the order (magnitude descending, index ascending) makes the choice unique; plain thresholding
    keeps every tie, and partial sorts of libraries leave ties open.

    Raises:
        UpdateError: not float32, not finite, or `count` out of range.
    """
    flat = flat_float32(delta)
    cut = find_cut(flat, count)
    bits = flat.view(np.uint32) & _MAGNITUDE
    keep = bits > np.uint32(cut.threshold_bits)
    if cut.ties:
        keep[np.flatnonzero(bits == np.uint32(cut.threshold_bits))[: cut.ties]] = True
    return np.flatnonzero(keep).astype(np.int32)


def top_k_signs(flat: Float32Array, cut: Cut) -> Int8Array:
    """Signs in {-1, 0, 1} of the entries that `cut` keeps, 0 elsewhere; a kept zero is 0 too. int8, flat."""
    bits = flat.view(np.uint32)
    trits = np.empty(flat.size, dtype=np.int8)
    _signs_above(bits, np.uint32(cut.threshold_bits), trits)
    if cut.ties and cut.threshold_bits:
        _signs_of_ties(bits, np.uint32(cut.threshold_bits), cut.ties, trits)
    return trits


def moments(flat: Float32Array) -> Moments:
    """Mean, standard deviation (divisor d, not d - 1) and root mean square of a finite float32 vector."""
    if flat.size == 0:
        return Moments(0.0, 0.0, 0.0)
    # Shifted by the first entry: the variance does not cancel, and that of a constant tensor is exactly 0.
    shift = float(flat[0])
    total, squares = _sum_shifted(flat, shift)
    offset = total / flat.size
    variance = max(0.0, squares / flat.size - offset * offset)
    mean = shift + offset
    return Moments(mean, math.sqrt(variance), math.sqrt(variance + mean * mean))


@compile_function
def _count_bins(bits: npt.NDArray[np.uint32], histogram: npt.NDArray[np.int64]) -> None:
    for i in range(bits.size):
        histogram[(bits[i] & _MAGNITUDE) >> _BIN_SHIFT] += 1


@compile_function
def _gather_bin(bits: npt.NDArray[np.uint32], wanted: np.uint32, out: npt.NDArray[np.uint32]) -> None:
    filled = 0
    for i in range(bits.size):
        magnitude = bits[i] & _MAGNITUDE
        # Written always and kept by the step: no branch to mispredict. `out` has one spare slot.
        out[filled] = magnitude
        filled += (magnitude >> _BIN_SHIFT) == wanted


@compile_function
def _signs_above(bits: npt.NDArray[np.uint32], threshold: np.uint32, trits: Int8Array) -> None:
    for i in range(bits.size):
        kept = np.int8((bits[i] & _MAGNITUDE) > threshold)
        negative = np.int8(bits[i] >> _SIGN_SHIFT)
        trits[i] = kept - np.int8(2) * (kept & negative)


@compile_function
def _signs_of_ties(bits: npt.NDArray[np.uint32], threshold: np.uint32, ties: int, trits: Int8Array) -> None:
    left = ties
    for i in range(bits.size):
        if (bits[i] & _MAGNITUDE) == threshold:
            trits[i] = 1 - 2 * np.int8(bits[i] >> _SIGN_SHIFT)
            left -= 1
            if left == 0:
                return


@compile_function
def _sum_shifted(flat: Float32Array, shift: float) -> tuple[float, float]:
    # Four chains hide the latency of the additions; their order is fixed by the index alone.
    t0 = t1 = t2 = t3 = 0.0
    s0 = s1 = s2 = s3 = 0.0
    whole = flat.size - flat.size % 4
    for i in range(0, whole, 4):
        a, b = np.float64(flat[i]) - shift, np.float64(flat[i + 1]) - shift
        c, d = np.float64(flat[i + 2]) - shift, np.float64(flat[i + 3]) - shift
        t0 += a
        t1 += b
        t2 += c
        t3 += d
        s0 += a * a
        s1 += b * b
        s2 += c * c
        s3 += d * d
    for i in range(whole, flat.size):
        last = np.float64(flat[i]) - shift
        t0 += last
        s0 += last * last
    return (t0 + t1) + (t2 + t3), (s0 + s1) + (s2 + s3)
