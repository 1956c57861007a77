"""Bytes that come from outside: equal in, equal out; anything else is an `UpdateError`."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.aggregation.exact_sum import ExactSum
from fedpeft.errors import UpdateError
from fedpeft.updates.packed import Packing
from fedpeft.updates.update import Layout, Update, arrays_digest, layout_of
from fedpeft.v1 import update_pb2 as pb
from fedpeft.wire.checksum import SIZE, seal
from fedpeft.wire.codec import PROTOCOL_VERSION, Envelope, decode, encode
from tests.core.strategies import several


def envelope(update: Update) -> Envelope:
    return Envelope(
        arrays=update.arrays,
        run_digest="d" * 64,
        round=3,
        state_digest="e" * 64,
        space="adapter-delta",
        client="hospital-2",
        weight=update.weight,
        metrics={"loss": 0.5, "steps": 7.0},
    )


ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([2**60, -1])}
LAYOUT = layout_of(ARRAYS)
PAYLOAD = encode(envelope(Update(ARRAYS, 5)))


@given(several(1, 1))
def test_what_goes_in_comes_out(case: tuple[Layout, list[Update]]) -> None:
    layout, (update,) = case
    sent = envelope(update)
    payload = encode(sent)
    for came in (decode(payload, who="x", layout=layout), decode(payload, who="x")):
        assert arrays_digest(came.arrays) == arrays_digest(sent.arrays)
        assert layout_of(came.arrays) == layout
        assert (came.client, came.round, came.weight, came.space) == (
            "hospital-2", 3, update.weight, "adapter-delta",
        )  # fmt: skip
        assert (came.run_digest, came.state_digest, dict(came.metrics)) == (
            sent.run_digest, sent.state_digest, sent.metrics,
        )  # fmt: skip
        assert encode(came) == payload
        assert not any(array.flags.writeable for array in came.arrays.values())


def test_special_floats_keep_their_bits() -> None:
    bits = np.array([0x7FC00001, 0xFF800000, 0x80000000, 0x00000001], np.uint32)
    came = decode(encode(envelope(Update({"a": bits.view(np.float32)}))), who="x")
    assert came.arrays["a"].view(np.uint32).tolist() == bits.tolist()


def test_memory_order_and_byte_order_do_not_matter() -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    forms = (matrix, np.asfortranarray(matrix), matrix.astype(">f4"), np.repeat(matrix, 2, axis=1)[:, ::2])
    assert len({encode(envelope(Update({"a": form}))) for form in forms}) == 1


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", "bool"])
def test_other_dtypes_have_no_place(dtype: str) -> None:
    with pytest.raises(UpdateError, match=dtype):
        encode(envelope(Update({"a": np.ones(2, dtype)})))


def harmless(payload: bytes, layout: Layout | None) -> None:
    """Decoding and folding either refuse with an `UpdateError` or give finite numbers of the right shape."""
    try:
        came = decode(payload, who="x", layout=layout)
        checked = layout or layout_of(came.arrays)
        total = ExactSum(checked, quantum_exponent=-20, capacity=4)
        total.fold(Update(came.arrays, came.weight))
        mean = total.mean()
    except UpdateError as error:
        assert "\n" not in str(error)  # noqa: PT017 - both outcomes are right
        return
    assert {name: array.shape for name, array in mean.items()} == {n: s for n, (s, _) in checked.items()}
    assert all(np.isfinite(array).all() for array in mean.values())


FLOATS = {"a": ARRAYS["a"], "c": np.ones(3, np.float32)}
FLOAT_PAYLOAD = encode(envelope(Update(FLOATS, 5)))


@pytest.mark.parametrize(
    "layout", [layout_of(FLOATS), Packing(layout_of(FLOATS)), None], ids=["known", "packed", "unknown"]
)
def test_every_truncation_and_every_changed_byte(layout: Layout | None) -> None:
    """As damage on the way, and as an attacker's work with a checksum that is right."""
    body = FLOAT_PAYLOAD[:-SIZE]
    for length in range(len(FLOAT_PAYLOAD)):
        with pytest.raises(UpdateError):
            decode(FLOAT_PAYLOAD[:length], who="x", layout=layout)
        harmless(seal([body[:length]]), layout)
    for position in range(len(FLOAT_PAYLOAD)):
        for mask in (0x01, 0x80, 0xFF):
            changed = bytearray(FLOAT_PAYLOAD)
            changed[position] ^= mask
            with pytest.raises(UpdateError):
                decode(bytes(changed), who="x", layout=layout)
            harmless(seal([bytes(changed[:-SIZE])]), layout)


@given(st.binary(max_size=200), st.booleans(), st.booleans())
def test_garbage(payload: bytes, known: bool, right_checksum: bool) -> None:
    harmless(seal([payload]) if right_checksum else payload, layout_of(FLOATS) if known else None)


@given(st.randoms(use_true_random=False))
def test_spliced_messages(rng: random.Random) -> None:
    """Cut out, doubled and swapped pieces reach deeper than single bytes."""
    payload = bytearray(FLOAT_PAYLOAD[:-SIZE])
    for _ in range(rng.randint(1, 4)):
        start, end = sorted(rng.randrange(len(payload) + 1) for _ in range(2))
        payload[start:end] = rng.choice([b"", payload[start:end] * 2, rng.randbytes(3), PAYLOAD[:20]])
    harmless(seal([bytes(payload)]), rng.choice([layout_of(FLOATS), Packing(layout_of(FLOATS)), None]))


def message(**tensor: object) -> bytes:
    values = tensor.pop("data", b"\0" * 4)
    fields: dict[str, object] = {"name": "a", "dtype": pb.DTYPE_FLOAT32, "shape": [1]}
    result = pb.Update(header=pb.Header(protocol_version=PROTOCOL_VERSION))
    result.dense.index.tensors.append(pb.TensorHead(**{**fields, **tensor}))  # type: ignore[arg-type]
    result.dense.values = values  # type: ignore[assignment]
    return seal([result.SerializeToString()])


@pytest.mark.parametrize(
    "tensor",
    [
        {"shape": [2]},
        {"shape": [2**63]},
        {"shape": [2**32, 2**32]},
        {"shape": [0, 2**63], "data": b""},
        {"shape": [0, 2**64 - 1], "data": b""},
        {"shape": [0, 2**47, 2**47], "data": b""},
        {"shape": [1] * 100},
        {"shape": [0] * 100, "data": b""},
        {"data": b""},
        {"data": b"\0" * 5},
        {"dtype": pb.DTYPE_INT64},
        {"dtype": pb.DTYPE_UNSPECIFIED},
        {"dtype": 99},
    ],
    ids=lambda tensor: str(tensor)[:40],
)
def test_arrays_that_contradict_themselves(tensor: dict[str, object]) -> None:
    assert decode(message(), who="x").arrays["a"].shape == (1,)
    one: Layout = {"a": ((1,), "<f4")}
    for layout in (None, one, Packing(one)):
        with pytest.raises(UpdateError, match=r"'a'|bytes are declared"):
            decode(message(**tensor), who="x", layout=layout)


@pytest.mark.parametrize(
    ("layout", "needle"),
    [
        ({**LAYOUT, "z": ((1,), "<f4")}, "'z' is missing, 2 of 3 came"),
        ({"a": LAYOUT["a"]}, "'b' is not part"),
        ({**LAYOUT, "a": ((3, 2), "<f4")}, r"float32\[2, 3\], expected float32\[3, 2\]"),
        ({**LAYOUT, "b": ((2,), "<f4")}, "expected float32"),
    ],
)
def test_a_foreign_layout_is_refused(layout: Layout, needle: str) -> None:
    with pytest.raises(UpdateError, match=f"hospital.*{needle}"):
        decode(PAYLOAD, who="hospital", layout=layout)


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1, 2**32 - 1])
def test_other_versions_are_refused(version: int) -> None:
    other = pb.Update.FromString(PAYLOAD)
    other.header.protocol_version = version
    with pytest.raises(UpdateError, match=f"version {version} came"):
        decode(seal([other.SerializeToString()]), who="x")


def test_an_array_that_comes_twice_is_refused() -> None:
    twice = pb.Update.FromString(PAYLOAD)
    twice.dense.index.tensors.append(twice.dense.index.tensors[0])
    with pytest.raises(UpdateError, match="'a' came twice"):
        decode(seal([twice.SerializeToString()]), who="x", layout=LAYOUT)


def test_a_message_without_arrays_is_refused() -> None:
    empty = pb.Update(header=pb.Header(protocol_version=PROTOCOL_VERSION))
    with pytest.raises(UpdateError, match="no known kind"):
        decode(seal([empty.SerializeToString()]), who="x")
