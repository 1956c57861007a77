"""The payloads of an update message: how arrays and compressed tensors become protobuf fields and back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedpeft.codec import (
    DenseTensor,
    Encoded,
    MaskedTensor,
    QuantisedTensor,
    SignTensor,
    SparseTensor,
    TernaryTensor,
    decode,
    encode,
)
from fedpeft.codec.arrays import element_count
from fedpeft.errors import UpdateError
from fedpeft.update import Arrays, EncodedArray, Layout
from fedpeft.v1 import update_pb2 as pb
from fedpeft.wire.bounds import MAX_TENSORS

Payload = Literal["dense", "sparse", "ternary", "quantised", "sign"]

FORMS: Mapping[Payload, tuple[type[Encoded], ...]] = {  # beside DenseTensor: what the compressor left alone
    "sparse": (SparseTensor, MaskedTensor),
    "ternary": (TernaryTensor,),
    "quantised": (QuantisedTensor,),
    "sign": (SignTensor,),
}
_DTYPES = {"<f4": pb.DTYPE_FLOAT32, "<i8": pb.DTYPE_INT64}
_NUMPY = {number: np.dtype(name) for name, number in _DTYPES.items()}
_LAYOUT_DIGEST_BYTES = 8


def payload_of(encoded: Mapping[str, EncodedArray]) -> Payload:
    """The one payload that holds all these forms; "dense" for none.

    Raises:
        UpdateError: forms of two payloads, or one that has no place in the schema.
    """
    if not encoded:
        return "dense"
    kinds = {type(tensor) for tensor in encoded.values()} - {DenseTensor}
    for payload, forms in FORMS.items():
        if kinds and kinds <= set(forms):
            return payload
    names = ", ".join(sorted(kind.__name__ for kind in kinds)) or "no compressed tensor at all"
    raise UpdateError(f"an update of {names} came; one payload with one compressed form is needed")


def dense_field(arrays: Arrays) -> list[bytes | memoryview]:
    """The payload of plain arrays as the pieces of its serialised field, values uncopied.

    Protobuf's own serialiser moves large values several times. These are the bytes that it would write: a
    field's key, its length, its content (protocol buffers encoding, "Length-Delimited Records").

    Raises:
        UpdateError: an array whose dtype has no place in the schema.
    """
    pieces: list[bytes | memoryview] = []
    for name, array in arrays.items():
        number = _DTYPES.get(array.dtype.newbyteorder("<").str)
        if number is None:
            raise UpdateError(f"array {name!r} is {array.dtype.name}; only float32 and int64 can be sent")
        values = np.ascontiguousarray(array.reshape(-1), dtype=_NUMPY[number]).view(np.uint8)
        head = pb.DenseTensor(name=name, dtype=number, shape=array.shape).SerializeToString()
        if values.size:
            head += _DATA_KEY + _varint(values.size)
        pieces += (_TENSOR_KEY + _varint(len(head) + values.size) + head, values.data)
    return [_DENSE_KEY + _varint(sum(len(piece) for piece in pieces)), *pieces]


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _key(message: Any, field: str) -> bytes:
    return _varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | 2)


_DENSE_KEY, _TENSOR_KEY = _key(pb.Update, "dense"), _key(pb.Dense, "tensors")
_DATA_KEY = _key(pb.DenseTensor, "data")


def read_dense(dense: pb.Dense, who: str, layout: Layout | None) -> dict[str, NDArray[Any]]:
    """Check and take out plain arrays: read-only, one per name, all of `layout` if it is given.

    Raises:
        UpdateError: they contradict `layout` or themselves.
    """
    if len(dense.tensors) > MAX_TENSORS:
        raise UpdateError(f"{who}: {len(dense.tensors)} arrays came, at most {MAX_TENSORS} are accepted")
    arrays: dict[str, NDArray[Any]] = {}
    for tensor in dense.tensors:
        if tensor.name in arrays:
            raise UpdateError(f"{who}: array {tensor.name!r} came twice")
        arrays[tensor.name] = _array(tensor, layout, who)
    if layout is not None and len(arrays) != len(layout):
        missing = sorted(set(layout) - set(arrays))
        raise UpdateError(f"{who}: array {missing[0]!r} is missing, {len(arrays)} of {len(layout)} came")
    return arrays


def _array(tensor: pb.DenseTensor, layout: Layout | None, who: str) -> NDArray[Any]:
    dtype = _NUMPY.get(tensor.dtype)
    if dtype is None:
        raise UpdateError(f"{who}: array {tensor.name!r} has the unknown dtype number {tensor.dtype}")
    shape, data = tuple(tensor.shape), tensor.data  # every access to a field of a message makes a copy
    if layout is not None:
        expected = layout.get(tensor.name)
        if expected is None:
            raise UpdateError(f"{who}: array {tensor.name!r} is not part of this run")
        if expected != (shape, dtype.str):
            raise UpdateError(
                f"{who}: array {tensor.name!r} is {dtype.name}{list(shape)}, expected"
                f" {np.dtype(expected[1]).name}{list(expected[0])}"
            )
        count = math.prod(shape)  # the run's own shape, which needs no bound
    else:
        count = _bounded_count(tensor.name, shape, who)
    if count * dtype.itemsize != len(data):
        raise UpdateError(f"{who}: array {tensor.name!r} declares {list(shape)} and brings {len(data)} bytes")
    return np.frombuffer(data, dtype=dtype).reshape(shape)


def _bounded_count(name: str, shape: tuple[int, ...], who: str) -> int:
    try:
        return element_count(shape)
    except UpdateError as error:
        raise UpdateError(f"{who}: array {name!r}: {error}") from error


def write_coded(coded: pb.Coded, encoded: Mapping[str, EncodedArray]) -> None:
    """Fill in a payload of compressed tensors, which stand for every array of the update.

    Raises:
        UpdateError: a form that the codec doesn't know.
    """
    shapes = {name: (tensor.shape, "<f4") for name, tensor in encoded.items()}
    coded.layout_digest = _layout_digest(shapes)
    for name in sorted(encoded):
        tensor = encoded[name]
        if not isinstance(tensor, Encoded):
            raise UpdateError(f"array {name!r} is a {type(tensor).__name__}, which has no place in a message")
        coded.tensors.append(encode(tensor))


def read_coded(coded: pb.Coded, payload: Payload, who: str, layout: Layout) -> dict[str, Encoded]:
    """Check and take out compressed tensors: one per array of `layout`, each of a form of `payload`.

    A tensor's declared shape is compared with the layout's before anything of that size is allocated.

    Raises:
        UpdateError: they contradict `layout`, `payload` or themselves.
    """
    integral = [name for name, (_, dtype) in layout.items() if dtype != "<f4"]
    if integral:
        raise UpdateError(f"{who}: compressed floats came, array {integral[0]!r} of this run is exact")
    if coded.layout_digest != _layout_digest(layout) or len(coded.tensors) != len(layout):
        raise UpdateError(
            f"{who}: {len(coded.tensors)} compressed tensors of another layout came, this run has"
            f" {len(layout)} arrays; names and shapes must be those of the state that was sent"
        )
    forms = (*FORMS[payload], DenseTensor)
    tensors: dict[str, Encoded] = {}
    for name, data in zip(sorted(layout), coded.tensors, strict=True):
        try:
            tensor = decode(data, layout[name][0])
        except UpdateError as error:
            raise UpdateError(f"{who}: array {name!r}: {error}") from error
        if not isinstance(tensor, forms):
            raise UpdateError(
                f"{who}: array {name!r} is a {type(tensor).__name__}, which is no {payload} payload"
            )
        tensors[name] = tensor
    return tensors


def _layout_digest(layout: Layout) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(layout):
        shape, dtype = layout[name]
        digest.update(f"{name}\0{dtype}\0{list(shape)}\0".encode())
    return digest.digest()[:_LAYOUT_DIGEST_BYTES]
