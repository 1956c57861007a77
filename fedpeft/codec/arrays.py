"""Array aliases and the checks that every codec function starts with."""

import math

import numpy as np
import numpy.typing as npt

from fedpeft.errors import UpdateError

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Int8Array = npt.NDArray[np.int8]
Uint8Array = npt.NDArray[np.uint8]
Shape = tuple[int, ...]

MAX_ELEMENTS = 2**31 - 1
"""Positions are held as int32: a larger tensor is refused, not wrapped."""
MAX_DIMENSIONS = 8


def element_count(shape: Shape) -> int:
    """Number of elements of `shape`, 1 for a 0-d tensor. Raises UpdateError outside the codec's bounds."""
    if len(shape) > MAX_DIMENSIONS or any(side < 0 for side in shape):
        raise UpdateError(f"tensor shape {shape}: needs at most {MAX_DIMENSIONS} dimensions, none negative")
    # Without its zeros: an empty tensor with huge other sides cannot be built either.
    if math.prod(max(1, side) for side in shape) > MAX_ELEMENTS:
        raise UpdateError(f"tensor shape {shape}: split it, {MAX_ELEMENTS} elements are the most")
    return math.prod(shape)


def flat_float32(delta: npt.NDArray[np.floating]) -> Float32Array:
    """`delta` as a contiguous flat float32 array (a view where it already is one).

    Raises UpdateError for another dtype than float32 and outside the codec's bounds. Finiteness is checked
    where the values are read, not in an extra pass.
    """
    if delta.dtype != np.float32:
        raise UpdateError(f"a delta of dtype {delta.dtype} came: float32 is needed, convert it first")
    element_count(delta.shape)
    return np.ascontiguousarray(delta).reshape(-1)


def finite_float32(delta: npt.NDArray[np.floating]) -> Float32Array:
    """`flat_float32` that also raises UpdateError when a value is NaN or infinite."""
    flat = flat_float32(delta)
    if not np.isfinite(flat).all():
        raise UpdateError("a delta holds NaN or infinity: drop the update or lower the learning rate")
    return flat


def float32_scalar(value: float, what: str) -> float:
    """`value` rounded to float32: what is held equals what travels. Raises UpdateError if not finite."""
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    if not math.isfinite(rounded):
        raise UpdateError(f"{what} is {value}: a finite float32 is needed")
    return rounded


def freeze(array: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """A read-only contiguous view of `array`, copied only if it is not contiguous.

    The caller's own array stays writable: whoever hands one over leaves it alone from then on.
    """
    # `asarray` for NumPy scalars, which arithmetic on 0-d arrays gives; `copy` keeps 0-d shapes.
    whole = np.asarray(array)
    view = (whole if whole.flags.c_contiguous else whole.copy(order="C")).view()
    view.flags.writeable = False
    return view
