"""The payload of plain arrays: an index of names, dtypes and shapes, and all values in one field.

Values are neither copied nor parsed one array at a time: an index that is byte for byte the run's own has
been checked as a whole, and the arrays are then views of the received bytes.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from fedpeft.codec.arrays import element_count
from fedpeft.errors import UpdateError
from fedpeft.updates.packed import PackedArrays, Packing, packable, packing_of
from fedpeft.updates.update import Arrays, Layout, layout_of
from fedpeft.v1 import update_pb2 as pb
from fedpeft.wire.fields import Field, MalformedError, key_of, length_delimited, number_of, varint
from fedpeft.wire.size_limits import MAX_TENSORS

ALIGNMENT = 8  # bytes: what the widest dtype needs to be read in place

_DTYPES = {"<f4": pb.DTYPE_FLOAT32, "<i8": pb.DTYPE_INT64}
_NUMPY = {number: np.dtype(name) for name, number in _DTYPES.items()}
_DENSE, _DENSE_KEY = number_of(pb.Update, "dense"), key_of(pb.Update, "dense")
_INDEX_KEY, _PADDING_KEY, _VALUES_KEY = (key_of(pb.Dense, name) for name in ("index", "padding", "values"))
_INDEX, _VALUES = number_of(pb.Dense, "index"), number_of(pb.Dense, "values")

Pieces = list[bytes | memoryview]


def dense_field(arrays: Arrays, offset: int) -> Pieces:
    """The serialised field in pieces, values uncopied.

    Args:
        offset: bytes of the message before this field; the values are aligned in the whole message.

    Raises:
        UpdateError: an array whose dtype has no place in the schema.
    """
    layout = layout_of(arrays)
    index = _cached_index(layout) if isinstance(layout, Packing) else _index(layout)
    values = _values(arrays)
    return [_head(index, sum(piece.nbytes for piece in values), offset % ALIGNMENT), *values]


@functools.lru_cache(maxsize=32)
def _head(index: bytes, size: int, offset: int) -> bytes:
    """What comes before `size` bytes of values: keys, the index, and padding that aligns them.

    Args:
        offset: where the field begins, modulo the alignment.
    """
    tail = _VALUES_KEY + varint(size) if size else b""
    for padding in range(ALIGNMENT):
        fill = _PADDING_KEY + varint(padding) + bytes(padding) if padding else b""
        inner = index + fill + tail
        head = _DENSE_KEY + varint(len(inner) + size) + inner
        if (offset + len(head)) % ALIGNMENT == 0:
            break
    return head


def _values(arrays: Arrays) -> list[memoryview]:
    if isinstance(arrays, PackedArrays):
        return [_bytes_of(arrays.flat)]
    return [_bytes_of(array) for array in arrays.values() if array.size]


def _bytes_of(array: NDArray[Any]) -> memoryview:
    little = np.ascontiguousarray(array.reshape(-1), dtype=array.dtype.newbyteorder("<"))
    return little.view(np.uint8).data


def _index(layout: Layout) -> bytes:
    """The index as a field of its message."""
    index = pb.Index()
    for name, (shape, dtype) in layout.items():
        number = _DTYPES.get(np.dtype(dtype).newbyteorder("<").str)
        if number is None:
            raise UpdateError(f"array {name!r} is {np.dtype(dtype).name}; only float32 and int64 can be sent")
        index.tensors.add(name=name, dtype=number, shape=shape)
    content = index.SerializeToString(deterministic=True)
    return _INDEX_KEY + varint(len(content)) + content


_cached_index = functools.lru_cache(maxsize=8)(_index)


def read_dense(payload: bytes, field: Field, who: str, layout: Layout | None) -> Arrays:
    """Check and take out plain arrays: read-only, one per name, all of `layout` if it is given.

    Args:
        payload: the whole message.
        field: where its dense payload lies.

    Raises:
        UpdateError: they contradict `layout` or themselves.
    """
    index, values = _parts(payload, field, who)
    if isinstance(layout, Packing) and payload[index.key : index.end] == _cached_index(layout):
        entries: Layout = layout
    elif layout is None:
        entries = _own_entries(payload[index.content : index.end], who)
    else:
        entries = _entries(payload[index.content : index.end], who, layout)
    needed = _size_in_bytes(entries)
    start, came = (values.content, values.end - values.content) if values else (0, 0)
    if needed != came:
        raise UpdateError(f"{who}: {len(entries)} arrays of {needed} bytes are declared and {came} came")
    packing = entries if isinstance(entries, Packing) else _packing(entries)
    if packing is None:
        return _one_by_one(payload, entries, start)
    return PackedArrays(_view(payload, packing.dtype, packing.size, start), packing)


def _packing(entries: Layout) -> Packing | None:
    """The packing of arrays that came in its order, if they have one."""
    packing = packing_of(entries) if packable(entries) else None
    return packing if packing is not None and list(packing) == list(entries) else None


def _size_in_bytes(entries: Layout) -> int:
    if isinstance(entries, Packing):
        return entries.size * entries.dtype.itemsize
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in entries.values())


def _parts(payload: bytes, field: Field, who: str) -> tuple[Field, Field | None]:
    """The index, and the values if there are any."""
    try:
        parts = list(length_delimited(payload, field.content, field.end))
    except MalformedError as error:
        raise UpdateError(f"{who}: the plain arrays' payload is malformed: {error}") from error
    index = [part for part in parts if part.number == _INDEX]
    values = [part for part in parts if part.number == _VALUES]
    if len(index) != 1 or len(values) > 1:
        raise UpdateError(
            f"{who}: {len(index)} indices and {len(values)} blocks of values came, one of each is needed"
        )
    return index[0], values[0] if values else None


def _entries(content: bytes, who: str, layout: Layout | None) -> Layout:
    """What an index declares, checked against `layout` or, without one, against fixed bounds."""
    try:
        index = pb.Index.FromString(content)
    except DecodeError as error:
        raise UpdateError(f"{who}: the plain arrays' index is malformed") from error
    if len(index.tensors) > MAX_TENSORS:
        raise UpdateError(f"{who}: {len(index.tensors)} arrays came, at most {MAX_TENSORS} are accepted")
    entries: dict[str, tuple[tuple[int, ...], str]] = {}
    for head in index.tensors:
        if head.name in entries:
            raise UpdateError(f"{who}: array {head.name!r} came twice")
        entries[head.name] = _entry(head, who, layout)
    if layout is not None and len(entries) != len(layout):
        missing = sorted(set(layout) - set(entries))
        raise UpdateError(f"{who}: array {missing[0]!r} is missing, {len(entries)} of {len(layout)} came")
    return entries


@functools.lru_cache(maxsize=4)
def _own_entries(content: bytes, who: str) -> Layout:
    """What a state's index declares, which is the same in every round."""
    entries = _entries(content, who, None)
    return packing_of(entries) if _packing(entries) is not None else entries


def _entry(head: pb.TensorHead, who: str, layout: Layout | None) -> tuple[tuple[int, ...], str]:
    dtype, shape = _NUMPY.get(head.dtype), tuple(head.shape)
    if dtype is None:
        raise UpdateError(f"{who}: array {head.name!r} has the unknown dtype number {head.dtype}")
    if layout is None:
        try:
            element_count(shape)
        except UpdateError as error:
            raise UpdateError(f"{who}: array {head.name!r}: {error}") from error
        return shape, dtype.str
    expected = layout.get(head.name)
    if expected is None:
        raise UpdateError(f"{who}: array {head.name!r} is not part of this run")
    if expected != (shape, dtype.str):
        raise UpdateError(
            f"{who}: array {head.name!r} is {dtype.name}{list(shape)}, expected"
            f" {np.dtype(expected[1]).name}{list(expected[0])}"
        )
    return shape, dtype.str


def _one_by_one(payload: bytes, entries: Layout, place: int) -> dict[str, NDArray[Any]]:
    """Arrays of several dtypes, or in an order of the sender's own."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, (shape, text) in entries.items():
        dtype, count = np.dtype(text), math.prod(shape)
        arrays[name] = _view(payload, dtype, count, place).reshape(shape)
        place += count * dtype.itemsize
    return arrays


def _view(payload: bytes, dtype: np.dtype[Any], count: int, place: int) -> NDArray[Any]:
    """Entries where they lie in the message; copied only if the sender didn't align them."""
    view: NDArray[Any] = np.frombuffer(payload, dtype=dtype, count=count, offset=place)
    return view if view.flags.aligned else view.copy()


def find_dense(payload: bytes, end: int) -> Field | None:
    """The dense field of ``payload[:end]``, the first if there are several; None if there is none.

    Raises:
        MalformedError: the bytes are no message.
    """
    fields = length_delimited(payload, 0, end)
    return next((field for field in fields if field.number == _DENSE), None)
