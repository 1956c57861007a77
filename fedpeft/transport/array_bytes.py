"""Flower's `Array` from and to NumPy with one copy and with none, where its own ways make three and two.

The bytes are those that `Array(values)` would hold: the .npy format, version 1.0.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array
from numpy.lib import format as npy
from numpy.typing import NDArray

_KIND = "numpy.ndarray"  # Flower's name for .npy bytes


class Readable(Array):
    """An array that gives its values without copies, and read-only."""

    def numpy(self) -> NDArray[Any]:
        """See `values_of`."""
        return values_of(self)


def array_of(values: NDArray[Any]) -> Array:
    """Flower's array of contiguous values; holds what `Array(values)` does."""
    header = BytesIO()
    npy.write_array_header_1_0(header, npy.header_data_from_array_1_0(values))
    data = b"".join((header.getvalue(), values.reshape(-1).view(np.uint8).data))
    return Readable(str(values.dtype), tuple(values.shape), _KIND, data)


def values_of(array: Array) -> NDArray[Any]:
    """The values, read-only where they lie in the array; as `array.numpy()`, which also reads other forms.

    Raises:
        TypeError: the array holds something else than .npy bytes.
    """
    if array.stype != _KIND:
        return Array.numpy(array)
    stream = BytesIO(array.data)
    if npy.read_magic(stream) != (1, 0):
        return Array.numpy(array)
    shape, fortran, dtype = npy.read_array_header_1_0(stream)
    if fortran or dtype.hasobject:
        return Array.numpy(array)
    count = int(np.prod(shape, dtype=np.int64))
    flat = np.frombuffer(array.data, dtype=dtype, count=count, offset=stream.tell())
    return flat.reshape(shape)
