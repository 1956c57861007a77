"""Plain arrays are written piece by piece; protobuf itself must write the same bytes."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.v1 import update_pb2 as pb
from fedpeft.wire.checksum import SIZE
from fedpeft.wire.codec import Envelope, decode, encode

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
named_shapes = st.dictionaries(st.text(min_size=1, max_size=300), shapes, min_size=1, max_size=4)


def counted(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)


def envelope(values: dict[str, np.ndarray]) -> Envelope:
    return Envelope(
        values, "ab" * 32, 3, "cd" * 32, "adapter-delta", client="c", weight=7, metrics={"loss": 1.5}
    )


@given(named_shapes)
def test_the_bytes_are_protobufs_own(named: dict[str, tuple[int, ...]]) -> None:
    body = encode(envelope({name: counted(shape) for name, shape in named.items()}))[:-SIZE]
    assert pb.Update.FromString(body).SerializeToString(deterministic=True) == body


def test_a_large_array_and_odd_layouts_in_memory() -> None:
    large = np.arange(70_000, dtype=np.float32).reshape(100, 700)
    values = {
        "large": large,
        "transposed": large.T,
        "strided": large[::3, ::7],
        "swapped": large.astype(">f4"),
    }
    payload = encode(envelope(values))
    assert pb.Update.FromString(payload[:-SIZE]).SerializeToString(deterministic=True) == payload[:-SIZE]
    read = decode(payload, who="test").arrays
    for name, array in values.items():
        np.testing.assert_array_equal(read[name], array)
