"""`Envelope` to protobuf bytes and back: the one form in which arrays leave a process.

A length is never trusted: shapes and dtypes are checked against the run's own layout, and byte counts against
shapes, before an array is made. Arrays that come out are read-only views of the received bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from google.protobuf.message import DecodeError

from fedpeft.errors import UpdateError
from fedpeft.update import Arrays, Layout, frozen_arrays
from fedpeft.v1 import update_pb2 as pb

PROTOCOL_VERSION = 1
MAX_DIMENSIONS, MAX_ENTRIES = 16, 2**48  # beyond any model; beyond what NumPy can express lie other errors

_DTYPES = {"<f4": pb.DTYPE_FLOAT32, "<i8": pb.DTYPE_INT64}
_NUMPY = {number: np.dtype(name) for name, number in _DTYPES.items()}


@dataclass(frozen=True)
class Envelope:
    """Arrays with what a receiver needs to know before it uses them.

    `client` is empty on the way down. `state_digest` is the fingerprint of the global state that the arrays
    are, or that the client started from.
    """

    arrays: Arrays
    run_digest: str
    round: int
    state_digest: str
    space: str
    client: str = ""
    weight: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrays", frozen_arrays(self.arrays))


def encode(envelope: Envelope) -> bytes:
    """Serialise; equal envelopes give equal bytes.

    Raises:
        UpdateError: an array whose dtype has no place in the schema.
    """
    message = pb.Update()
    tensors = message.dense.tensors  # filled in place: messages passed to constructors are copied
    for name, array in envelope.arrays.items():
        number = _DTYPES.get(array.dtype.newbyteorder("<").str)
        if number is None:
            raise UpdateError(f"array {name!r} is {array.dtype.name}; only float32 and int64 can be sent")
        little = array.astype(_NUMPY[number], copy=False)
        tensors.add(name=name, dtype=number, shape=array.shape, data=little.tobytes())
    header = message.header
    header.protocol_version = PROTOCOL_VERSION
    header.run_digest = envelope.run_digest
    header.round = envelope.round
    header.client = envelope.client
    header.state_digest = envelope.state_digest
    header.space = envelope.space
    header.weight = envelope.weight
    header.metrics.update(envelope.metrics)
    return message.SerializeToString(deterministic=True)


def decode(payload: bytes, *, who: str, layout: Layout | None = None) -> Envelope:
    """Parse and check bytes that came from outside.

    Args:
        payload: what `encode` made, or what an attacker made of it.
        who: named in errors.
        layout: what the arrays must be; without it only the message's own consistency is checked (a client
            that receives the first state has no layout to compare with).

    Raises:
        UpdateError: not a message of this version, or one that contradicts itself or `layout`.
    """
    try:
        message = pb.Update.FromString(payload)
    except DecodeError as error:
        raise UpdateError(
            f"{who}: {len(payload)} bytes came that are no update message (truncated or foreign)"
        ) from error
    header = message.header
    if header.protocol_version != PROTOCOL_VERSION:
        raise UpdateError(
            f"{who}: protocol version {header.protocol_version} came, {PROTOCOL_VERSION} is spoken here;"
            " update the older side"
        )
    if message.WhichOneof("payload") != "dense":
        raise UpdateError(f"{who}: the message carries no arrays")
    arrays = {}
    for tensor in message.dense.tensors:
        if tensor.name in arrays:
            raise UpdateError(f"{who}: array {tensor.name!r} came twice")
        arrays[tensor.name] = _array(tensor, layout, who)
    if layout is not None and len(arrays) != len(layout):
        missing = sorted(set(layout) - set(arrays))
        raise UpdateError(f"{who}: array {missing[0]!r} is missing, {len(arrays)} of {len(layout)} came")
    return Envelope(
        arrays=arrays,
        run_digest=header.run_digest,
        round=header.round,
        state_digest=header.state_digest,
        space=header.space,
        client=header.client,
        weight=header.weight,
        metrics=dict(header.metrics),
    )


def _array(tensor: pb.DenseTensor, layout: Layout | None, who: str) -> np.ndarray:
    dtype = _NUMPY.get(tensor.dtype)
    if dtype is None:
        raise UpdateError(f"{who}: array {tensor.name!r} has the unknown dtype number {tensor.dtype}")
    shape = tuple(tensor.shape)
    if layout is not None:
        expected = layout.get(tensor.name)
        if expected is None:
            raise UpdateError(f"{who}: array {tensor.name!r} is not part of this run")
        if expected != (shape, dtype.str):
            raise UpdateError(
                f"{who}: array {tensor.name!r} is {dtype.name}{list(shape)}, expected"
                f" {np.dtype(expected[1]).name}{list(expected[0])}"
            )
    fits = len(shape) <= MAX_DIMENSIONS and math.prod(max(side, 1) for side in shape) < MAX_ENTRIES
    if not fits or math.prod(shape) * dtype.itemsize != len(tensor.data):
        raise UpdateError(
            f"{who}: array {tensor.name!r} declares {list(shape)[:MAX_DIMENSIONS]} and brings"
            f" {len(tensor.data)} bytes"
        )
    return np.frombuffer(tensor.data, dtype=dtype).reshape(shape)
