"""Arrays of one dtype side by side in one buffer: a set of small tensors that is copied and added as one.

An adapter has dozens of small tensors, and a Python operation on each costs more than its bytes. Whoever
handles whole updates (the wire, the exact sum, the adapter space) works on the buffer; everyone else sees a
mapping of read-only arrays.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Entry = tuple[tuple[int, ...], str]  # an array's shape, and its dtype as NumPy's type string


@dataclass(frozen=True)
class ArraySpan:
    """Where an array lies in the buffer, in entries."""

    start: int
    end: int
    shape: tuple[int, ...]


class Packing(Mapping[str, Entry]):
    """A layout whose arrays have one dtype, with the place of each: in the order of names, without gaps.

    Packings are equal if their entries are, and hashable; `packing_of` gives one to all who need the same.

    Args:
        layout: name to (shape, dtype), all of one dtype and at least one.

    Raises:
        ValueError: no arrays, or several dtypes; see `packable`.
    """

    def __init__(self, layout: Mapping[str, Entry]) -> None:
        dtypes = {dtype for _, dtype in layout.values()}
        if len(dtypes) != 1:
            raise ValueError(f"arrays of {len(dtypes)} dtypes cannot be packed")
        self._entries = dict(sorted(layout.items()))
        self.spans: dict[str, ArraySpan] = {}
        start = 0
        for name, (shape, _) in self._entries.items():
            end = start + math.prod(shape)
            self.spans[name] = ArraySpan(start, end, shape)
            start = end
        self.size = start
        self.dtype = np.dtype(dtypes.pop())
        self._hash = hash(tuple(self._entries.items()))

    def like(self, dtype: str) -> Packing:
        """The same arrays in another dtype, given as NumPy's type string."""
        return packing_of({name: (shape, dtype) for name, (shape, _) in self.items()})

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        entries = other._entries if isinstance(other, Packing) else other
        return bool(self._entries == entries)


def packing_of(layout: Mapping[str, Entry]) -> Packing:
    """The packing of a layout; equal layouts get the same object, so that comparing them costs nothing."""
    return _first(layout if isinstance(layout, Packing) else Packing(layout))


@functools.lru_cache(maxsize=32)
def _first(packing: Packing) -> Packing:
    """The first of all that are equal."""
    return packing


def packable(layout: Mapping[str, Entry]) -> bool:
    """Whether arrays of this layout fit one buffer: there are some, and they have one dtype."""
    return len({dtype for _, dtype in layout.values()}) == 1


class PackedArrays(Mapping[str, NDArray[Any]]):
    """Read-only arrays that are views of one read-only buffer.

    Args:
        flat: [packing.size] of the packing's dtype, contiguous; kept, not copied.
    """

    def __init__(self, flat: NDArray[Any], packing: Packing) -> None:
        if flat.shape != (packing.size,) or flat.dtype != packing.dtype or not flat.flags.c_contiguous:
            raise ValueError(
                f"a buffer of {flat.dtype}{list(flat.shape)} came, {packing.dtype}[{packing.size}] is needed"
            )
        self.flat = flat.view()
        self.flat.flags.writeable = False
        self.packing = packing

    def __getitem__(self, name: str) -> NDArray[Any]:
        span = self.packing.spans[name]
        return self.flat[span.start : span.end].reshape(span.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.packing)

    def __len__(self) -> int:
        return len(self.packing)


def pack(arrays: Mapping[str, NDArray[Any]], packing: Packing) -> PackedArrays:
    """Copy arrays of this layout into one buffer; packed ones are returned as they are."""
    if isinstance(arrays, PackedArrays) and arrays.packing == packing:
        return arrays
    flat = np.empty(packing.size, dtype=packing.dtype)
    for name, span in packing.spans.items():
        flat[span.start : span.end] = arrays[name].reshape(-1)
    return PackedArrays(flat, packing)
