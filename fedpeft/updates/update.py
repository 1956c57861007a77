"""The element that travels: named arrays with a weight, and the vector space they form.

Laws (property-tested): for updates u, v, w of one layout, ``u + v == v + u``; ``(u + v) + w`` equals ``u + (v
+ w)`` up to float rounding (exactly for integers); ``u.scale(1) == u``; ``(u + v).weight == u.weight +
v.weight``; ``u.scale(a).global_norm() == |a| * u.global_norm()`` up to rounding.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import UpdateError
from fedpeft.updates.packed import Entry, PackedArrays, Packing

Arrays = Mapping[str, NDArray[Any]]


class EncodedArray(Protocol):
    """A float array in another form, finite by construction."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        ...

    def dense(self) -> NDArray[Any]:
        """The array itself: float32 of `shape`.

        Raises:
            UpdateError: the form contradicts itself.
        """
        ...


def freeze_arrays(arrays: Arrays) -> Arrays:
    """A read-only mapping of read-only views, sorted by name, nothing copied; packed arrays stay packed."""
    if isinstance(arrays, PackedArrays):
        return arrays
    result: dict[str, NDArray[Any]] = {}
    for name in sorted(arrays):
        view = np.asarray(arrays[name]).view()
        view.flags.writeable = False
        result[name] = view
    return MappingProxyType(result)


@dataclass(frozen=True)
class Update:
    """What one client contributes: arrays by name, and the weight with which they count.

    Between a compressing stage's client hook and its server hook the values are in `encoded` instead of
    `arrays`. Such an update is a message and no vector: adding, scaling and measuring it is refused.

    Attributes:
        arrays: parameter (or scalar-vector) name to array; floats are float32, exact quantities int64.
        weight: how much it counts in a weighted mean; rows of training data, or 1 under uniform weighting.
        metrics: numbers that accompany it (loss, steps, examples); never aggregated into the state.
        encoded: name to compressed array; no name is in both mappings.
    """

    arrays: Arrays
    weight: int = 1
    metrics: Mapping[str, float] = field(default_factory=dict)
    encoded: Mapping[str, EncodedArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrays", freeze_arrays(self.arrays))
        object.__setattr__(self, "metrics", MappingProxyType(dict(self.metrics)))
        object.__setattr__(self, "encoded", MappingProxyType(dict(sorted(self.encoded.items()))))
        both = sorted(self.arrays.keys() & self.encoded.keys()) if self.encoded else ()
        if both:
            raise UpdateError(f"array {both[0]!r} came both plain and encoded; one form is needed")

    def __add__(self, other: Update) -> Update:
        """Sum of arrays and weights; metrics are dropped, since they mean nothing for a sum."""
        self._require_vector()
        other._require_vector()
        check_layout(other.arrays, layout_of(self.arrays), who="the second update")
        arrays = {name: self.arrays[name] + other.arrays[name] for name in self.arrays}
        return Update(arrays, self.weight + other.weight)

    def scale(self, factor: float) -> Update:
        """Every float array times `factor`, the weight unchanged.

        Raises:
            UpdateError: integer arrays, whose scaling would leave the integers.
        """
        integral = [name for name, array in self.arrays.items() if array.dtype.kind in "iu"]
        if integral:
            raise UpdateError(f"cannot scale integer array {integral[0]!r}: integers are only added")
        return self.map(lambda _, array: array * np.asarray(factor, dtype=array.dtype))

    def map(self, function: Callable[[str, NDArray[Any]], NDArray[Any]]) -> Update:
        """The update with every array replaced by ``function(name, array)``."""
        self._require_vector()
        return replace(self, arrays={name: function(name, array) for name, array in self.arrays.items()})

    def global_norm(self) -> float:
        """L2 norm over all entries, accumulated in float64."""
        self._require_vector()
        return math.sqrt(sum(float(np.sum(np.square(a, dtype=np.float64))) for a in self.arrays.values()))

    def is_finite(self) -> bool:
        """Whether no entry is NaN or infinite."""
        return all(
            bool(np.isfinite(array).all()) for array in self.arrays.values() if array.dtype.kind == "f"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(sorted((*self.arrays, *self.encoded)))

    def _require_vector(self) -> None:
        if self.encoded:
            name = next(iter(self.encoded))
            raise UpdateError(
                f"array {name!r} is encoded: run the stages' server hooks before calculating with it"
            )


Layout = Mapping[str, Entry]


def layout_of(arrays: Arrays) -> Layout:
    """Name to (shape, dtype as NumPy's type string): what two sets of arrays must share to be added."""
    if isinstance(arrays, PackedArrays):
        return arrays.packing
    return {name: (array.shape, array.dtype.str) for name, array in sorted(arrays.items())}


def check_layout(arrays: Arrays, layout: Layout, *, who: str) -> None:
    """Refuse arrays whose names, shapes or dtypes differ from `layout`.

    Raises:
        UpdateError: naming the first difference and `who` sent it.
    """
    if isinstance(arrays, PackedArrays) and arrays.packing == layout:
        return
    if arrays.keys() != layout.keys():
        missing, unknown = sorted(layout.keys() - arrays.keys()), sorted(arrays.keys() - layout.keys())
        detail = f"lacks {missing[0]!r}" if missing else f"has the unknown array {unknown[0]!r}"
        raise UpdateError(f"{who} {detail}: {len(layout)} arrays are expected and {len(arrays)} came")
    for name, (shape, dtype) in layout.items():
        array = arrays[name]
        if array.shape != shape or array.dtype.str != dtype:
            came = _describe((array.shape, array.dtype.str))
            raise UpdateError(f"{who}: array {name!r} is {came}, expected {_describe((shape, dtype))}")


def _describe(entry: tuple[tuple[int, ...], str]) -> str:
    shape, dtype = entry
    return f"{np.dtype(dtype).name}[{', '.join(map(str, shape))}]"


def arrays_digest(arrays: Arrays) -> str:
    """SHA-256 (hex) of names, dtypes, shapes and little-endian bytes, names sorted: a state's fingerprint."""
    digest = hashlib.sha256()
    for head, values in _iterate_packed_parts(arrays) if isinstance(arrays, PackedArrays) else _parts(arrays):
        digest.update(head)
        digest.update(values)
    return digest.hexdigest()


def _parts(arrays: Arrays) -> Iterator[tuple[bytes, memoryview]]:
    """Each array's description and bytes."""
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        yield _head(name, array.shape, array.dtype), little.reshape(-1).view(np.uint8).data


def _iterate_packed_parts(arrays: PackedArrays) -> Iterator[tuple[bytes, memoryview]]:
    """As `_parts`, without an array object for each."""
    little = arrays.flat.astype(arrays.flat.dtype.newbyteorder("<"), copy=False).view(np.uint8).data
    for head, start, end in _places(arrays.packing):
        yield head, little[start:end]


@functools.lru_cache(maxsize=8)
def _places(packing: Packing) -> tuple[tuple[bytes, int, int], ...]:
    """Each array's description, and where its bytes lie."""
    width = packing.dtype.itemsize
    return tuple(
        (_head(name, span.shape, packing.dtype), span.start * width, span.end * width)
        for name, span in packing.spans.items()
    )


def _head(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    return f"{name}\0{dtype.name}\0{shape}\0".encode()
