"""The payloads of compressed tensors: how they become protobuf fields and back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal

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
from fedpeft.errors import UpdateError
from fedpeft.updates.update import EncodedArray, Layout
from fedpeft.v1 import update_pb2 as pb

Payload = Literal["dense", "sparse", "ternary", "quantised", "sign"]

FORMS: Mapping[Payload, tuple[type[Encoded], ...]] = {  # beside DenseTensor: what the compressor left alone
    "sparse": (SparseTensor, MaskedTensor),
    "ternary": (TernaryTensor,),
    "quantised": (QuantisedTensor,),
    "sign": (SignTensor,),
}
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
