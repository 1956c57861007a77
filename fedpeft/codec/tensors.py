"""What a compressed delta tensor holds: six frozen forms, each able to become a dense float32 array.

An instance is valid by construction: every field is checked once, arrays become read-only, and anything that
does not fit raises UpdateError. Positions are flat, in C order.
"""

from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fedpeft.codec.arrays import (
    Float32Array,
    Int8Array,
    Int32Array,
    Shape,
    Uint8Array,
    element_count,
    float32_scalar,
    freeze,
)
from fedpeft.codec.masks import PublicMask
from fedpeft.errors import UpdateError

_LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


class EncodedTensor(Protocol):
    """A compressed tensor: its dense shape, and the way back."""

    @property
    def shape(self) -> Shape:
        """Shape of the dense tensor."""
        ...

    def dense(self) -> Float32Array:
        """A fresh, writable float32 array of `shape`."""
        ...


@dataclass(frozen=True, eq=False)
class DenseTensor:
    """Every value as float32: the form of a tensor that no lossy method touched."""

    values: Float32Array

    def __post_init__(self) -> None:
        element_count(self.values.shape)
        _require(
            self.values.dtype == np.float32, f"dense values of dtype {self.values.dtype}: float32 is needed"
        )
        _require(
            bool(np.isfinite(self.values).all()), "dense values hold NaN or infinity: finite ones are needed"
        )
        object.__setattr__(self, "values", freeze(self.values).reshape(self.values.shape))

    @property
    def shape(self) -> Shape:
        """Shape of the dense tensor."""
        return self.values.shape

    def dense(self) -> Float32Array:
        """A writable copy of the values."""
        return self.values.copy()


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """Some entries as float32: `indices` int32 strictly ascending, `values` float32 of the same length."""

    shape: Shape
    indices: Int32Array
    values: Float32Array

    def __post_init__(self) -> None:
        size = element_count(self.shape)
        _check_vector(self.indices, np.dtype(np.int32), "sparse indices")
        _check_vector(self.values, np.dtype(np.float32), "sparse values")
        _require(
            self.indices.size == self.values.size,
            f"{self.indices.size} sparse indices and {self.values.size} values: one per index is needed",
        )
        if self.indices.size:
            inside = (
                self.indices[0] >= 0 and self.indices[-1] < size and bool((np.diff(self.indices) > 0).all())
            )
            _require(inside, f"sparse indices must ascend strictly from 0 to below {size}")
        _require(
            bool(np.isfinite(self.values).all()), "sparse values hold NaN or infinity: finite ones are needed"
        )
        object.__setattr__(self, "indices", freeze(self.indices))
        object.__setattr__(self, "values", freeze(self.values))

    def dense(self) -> Float32Array:
        """Zeros with the held values in their places."""
        flat = np.zeros(element_count(self.shape), dtype=np.float32)
        flat[self.indices] = self.values
        return flat.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class TernaryTensor:
    """`scale` (finite, non-negative float32) times `trits` (int8 in {-1, 0, 1} of the tensor's shape)."""

    trits: Int8Array
    scale: float

    def __post_init__(self) -> None:
        element_count(self.trits.shape)
        _require(self.trits.dtype == np.int8, f"ternary entries of dtype {self.trits.dtype}: int8 is needed")
        if self.trits.size:
            extremes = int(self.trits.min()), int(self.trits.max())
            _require(
                extremes[0] >= -1 and extremes[1] <= 1, f"ternary entries span {extremes}: -1, 0, 1 only"
            )
        object.__setattr__(self, "scale", _scale(self.scale, "ternary scale"))
        object.__setattr__(self, "trits", freeze(self.trits).reshape(self.trits.shape))

    @property
    def shape(self) -> Shape:
        """Shape of the dense tensor."""
        return self.trits.shape

    def dense(self) -> Float32Array:
        """The scale times trits, exact: each entry is -scale, +0 or scale."""
        return np.multiply(self.trits, np.float32(self.scale), out=np.empty(self.shape, dtype=np.float32))


@dataclass(frozen=True, eq=False)
class QuantisedTensor:
    """Integers times one float32 scale per channel.

    `codes` is int8 of the tensor's shape within +-(2^(bits-1) - 1); `scales` has one entry per index of
    `channel_axis`, or a single one when that is None.
    """

    codes: Int8Array
    scales: Float32Array
    bits: int
    channel_axis: int | None

    def __post_init__(self) -> None:
        element_count(self.codes.shape)
        _require(self.bits in (2, 4, 8), f"quantised to {self.bits} bits: 2, 4 or 8 are supported")
        _require(self.codes.dtype == np.int8, f"quantised codes of dtype {self.codes.dtype}: int8 is needed")
        largest = 2 ** (self.bits - 1) - 1
        if self.codes.size:
            extremes = int(self.codes.min()), int(self.codes.max())
            _require(
                extremes[0] >= -largest and extremes[1] <= largest,
                f"int{self.bits} codes span {extremes}: at most {largest} in magnitude is needed",
            )
        _check_vector(self.scales, np.dtype(np.float32), "quantisation scales")
        wanted = channel_count(self.codes.shape, self.channel_axis)
        _require(
            self.scales.size == wanted,
            f"{self.scales.size} quantisation scales: {wanted} channels need one each",
        )
        _require(
            bool(np.isfinite(self.scales).all()) and not bool(np.signbit(self.scales).any()),
            "quantisation scales must be finite and not negative",
        )
        peak = float(self.scales.max(initial=0.0)) * largest
        _require(
            peak <= _LARGEST_FLOAT32,
            f"quantised values reach {peak:g}: float32 is needed, send smaller scales",
        )
        object.__setattr__(self, "codes", freeze(self.codes).reshape(self.codes.shape))
        object.__setattr__(self, "scales", freeze(self.scales))

    @property
    def shape(self) -> Shape:
        """Shape of the dense tensor."""
        return self.codes.shape

    def dense(self) -> Float32Array:
        """The codes times their scales, one float32 rounding per entry."""
        scales = along_axis(self.scales, self.codes.ndim, self.channel_axis)
        return np.multiply(self.codes, scales, out=np.empty(self.shape, dtype=np.float32))


@dataclass(frozen=True, eq=False)
class SignTensor:
    """Every entry's sign times one scale.

    `packed` holds one bit per entry, least significant first; 1 is negative. There is no zero: an entry that
    was 0 comes back as +scale.
    """

    shape: Shape
    packed: Uint8Array
    scale: float

    def __post_init__(self) -> None:
        size = element_count(self.shape)
        _check_vector(self.packed, np.dtype(np.uint8), "packed signs")
        _require(
            self.packed.size == (size + 7) // 8,
            f"{self.packed.size} sign bytes: {(size + 7) // 8} are needed",
        )
        if size % 8:
            _require(int(self.packed[-1]) >> (size % 8) == 0, "bits after the last sign must be zero")
        object.__setattr__(self, "scale", _scale(self.scale, "sign scale"))
        object.__setattr__(self, "packed", freeze(self.packed))

    def dense(self) -> Float32Array:
        """-scale where the bit is set, scale elsewhere."""
        size = element_count(self.shape)
        negative = np.unpackbits(self.packed, count=size, bitorder="little")
        return np.where(negative, np.float32(-self.scale), np.float32(self.scale)).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class MaskedTensor:
    """Entries at public random positions: only `values` travel, `mask` regenerates where they go.

    `dense()` multiplies by `gain`: 1 to put the values back as they are, 1 / keep rate to make the whole
    unbiased.
    """

    shape: Shape
    mask: PublicMask
    values: Float32Array
    gain: float

    def __post_init__(self) -> None:
        size = element_count(self.shape)
        _check_vector(self.values, np.dtype(np.float32), "masked values")
        _require(
            bool(np.isfinite(self.values).all()), "masked values hold NaN or infinity: finite ones are needed"
        )
        _require(self.values.size <= size, f"{self.values.size} masked values for {size} entries: too many")
        object.__setattr__(self, "gain", _scale(self.gain, "gain of a masked tensor"))
        peak = float(np.abs(self.values).max(initial=0.0)) * self.gain
        _require(
            peak <= _LARGEST_FLOAT32, f"masked values times gain reach {peak:g}: float32 is needed, send less"
        )
        object.__setattr__(self, "values", freeze(self.values))

    def dense(self) -> Float32Array:
        """Zeros with gain x value at the mask's positions. Raises UpdateError if the counts differ."""
        size = element_count(self.shape)
        indices = self.mask.indices(size)
        _require(
            indices.size == self.values.size,
            f"{self.values.size} masked values came, the public mask keeps {indices.size}: the seeds differ",
        )
        flat = np.zeros(size, dtype=np.float32)
        flat[indices] = self.values * np.float32(self.gain)
        return flat.reshape(self.shape)


Encoded = DenseTensor | SparseTensor | TernaryTensor | QuantisedTensor | SignTensor | MaskedTensor


def identical(left: Encoded, right: Encoded) -> bool:
    """Same form and the same bits in every field."""
    if type(left) is not type(right):
        return False
    return all(_same(getattr(left, field.name), getattr(right, field.name)) for field in fields(left))


def channel_count(shape: Shape, channel_axis: int | None) -> int:
    """Number of scales that `shape` needs along `channel_axis`; 1 when it is None. Raises UpdateError."""
    if channel_axis is None:
        return 1
    _require(0 <= channel_axis < len(shape), f"channel axis {channel_axis} of a tensor with shape {shape}")
    return shape[channel_axis]


def along_axis(scales: Float32Array, dimensions: int, channel_axis: int | None) -> Float32Array:
    """`scales` reshaped so that it broadcasts over a tensor of `dimensions` axes."""
    if channel_axis is None:
        return scales.reshape((1,) * dimensions)
    return scales.reshape(tuple(-1 if axis == channel_axis else 1 for axis in range(dimensions)))


def _same(left: object, right: object) -> bool:
    if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    return left == right


def _scale(value: float, what: str) -> float:
    rounded = float32_scalar(value, what)
    _require(rounded >= 0.0, f"{what} is {value}: it must not be negative")
    return abs(rounded)


def _check_vector(array: npt.NDArray[np.generic], dtype: np.dtype[np.generic], what: str) -> None:
    fits = array.ndim == 1 and array.dtype == dtype
    _require(fits, f"{what} of dtype {array.dtype} with {array.ndim} dimensions: a {dtype} vector is needed")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UpdateError(message)
