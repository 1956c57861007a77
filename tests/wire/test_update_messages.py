"""Update messages: there and back, and everything that is refused on the way."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedpeft import codec
from fedpeft.errors import UpdateError
from fedpeft.updates.update import Layout, layout_of
from fedpeft.v1 import update_pb2 as pb
from fedpeft.wire.codec import Envelope, decode, encode
from fedpeft.wire.payloads import Payload
from fedpeft.wire.size_limits import max_payload_bytes
from tests.wire.fuzz_update import fuzz
from tests.wire.messages import DIGEST, ENVELOPES, LAYOUT, PAYLOADS, encoded, envelope, values

Change = Callable[[pb.Update], object]


def forged(payload: Payload, change: Change) -> bytes:
    """The payload's message with a change and a fitting checksum, made without the encoder's help."""
    message = pb.Update.FromString(encode(ENVELOPES[payload]))
    message.ClearField("checksum")
    change(message)
    body = message.SerializeToString()
    return body + b"\x79" + xxhash.xxh3_64(body).digest()[::-1]


def refusal(data: bytes, expect: Payload = "dense", layout: Layout | None = LAYOUT) -> str:
    with pytest.raises(UpdateError) as caught:
        decode(data, who="ward-7", layout=layout, expect=expect)
    text = str(caught.value)
    assert "ward-7" in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("payload", PAYLOADS)
def test_there_and_back(payload: Payload) -> None:
    sent = ENVELOPES[payload]
    came = decode(encode(sent), who="ward-7", layout=LAYOUT, expect=payload)
    for field in (
        "run_digest",
        "round",
        "state_digest",
        "space",
        "client",
        "weight",
        "base_digest",
        "stages",
    ):
        assert getattr(came, field) == getattr(sent, field)
    assert dict(came.metrics) == dict(sent.metrics)
    assert came.arrays.keys() == sent.arrays.keys()
    assert came.encoded.keys() == sent.encoded.keys()
    for name, array in sent.arrays.items():
        assert came.arrays[name].tobytes() == array.tobytes()
        assert came.arrays[name].shape == array.shape
    for name, tensor in sent.encoded.items():
        assert np.array_equal(came.encoded[name].dense(), tensor.dense())


def test_names_do_not_travel_with_compressed_tensors() -> None:
    assert b"a.weight" in encode(ENVELOPES["dense"])
    assert b"a.weight" not in encode(ENVELOPES["ternary"])


def test_an_unknown_weight_is_absent() -> None:
    message = pb.Update.FromString(encode(replace(ENVELOPES["dense"], weight=0)))
    assert not message.header.HasField("weight")
    assert decode(encode(replace(ENVELOPES["dense"], weight=0)), who="x").weight == 0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_float_or_integer_arrays_there_and_back(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([np.float32, np.int64]))
    arrays = data.draw(
        st.dictionaries(
            st.text(min_size=1, max_size=8).filter(lambda name: name.isprintable()),
            hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5)),
            max_size=4,
        )
    )
    sent = Envelope(arrays, DIGEST, 1, DIGEST, "s", weight=data.draw(st.integers(0, 2**64 - 1)))
    came = decode(encode(sent), who="x", layout=layout_of(arrays))
    assert came.weight == sent.weight
    assert {name: array.tobytes() for name, array in came.arrays.items()} == {
        name: array.tobytes() for name, array in arrays.items()
    }
    assert encode(came) == encode(sent)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(PAYLOADS[1:]))
def test_any_compressed_arrays_there_and_back(data: st.DataObject, payload: Payload) -> None:
    shapes = data.draw(st.lists(hnp.array_shapes(max_dims=3, max_side=8), min_size=1, max_size=3))
    elements = st.floats(-100, 100, width=32)
    arrays = {str(i): data.draw(hnp.arrays(np.float32, s, elements=elements)) for i, s in enumerate(shapes)}
    sent = envelope(payload, arrays)
    came = decode(encode(sent), who="x", layout=layout_of(arrays), expect=payload)
    assert encode(came) == encode(sent)
    for name, tensor in sent.encoded.items():
        assert np.array_equal(came.encoded[name].dense(), tensor.dense())


def test_every_single_bit_of_a_message_counts() -> None:
    for payload in PAYLOADS:
        data = bytearray(encode(ENVELOPES[payload]))
        for bit in range(8 * len(data)):
            data[bit // 8] ^= 1 << bit % 8
            with pytest.raises(UpdateError):
                decode(bytes(data), who="x", layout=LAYOUT, expect=payload)
            data[bit // 8] ^= 1 << bit % 8


def test_every_cut_is_seen() -> None:
    data = encode(ENVELOPES["ternary"])
    for length in range(len(data)):
        assert "send it again" in refusal(data[:length], "ternary")
    assert "send it again" in refusal(data + b"\0", "ternary")


def test_the_checksum_is_the_last_field_of_a_valid_message() -> None:
    data = encode(ENVELOPES["dense"])
    assert pb.Update.FromString(data).checksum == xxhash.xxh3_64_intdigest(data[:-9])


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (lambda m: setattr(m.header, "protocol_version", 2), "version 2"),
        (lambda m: m.ClearField("dense"), "no known kind"),
        (lambda m: m.masked.SetInParent(), "payload of masked"),
        (lambda m: m.seed_scalars.SetInParent(), "payload of seed_scalars"),
        (lambda m: setattr(m.dense.index.tensors[0], "dtype", 9), "dtype number 9"),
        (lambda m: setattr(m.dense.index.tensors[0], "dtype", 2), r"int64\[6, 20\]"),
        (lambda m: m.dense.index.tensors[0].shape.__setitem__(0, 2**60), "expected float32"),
        (lambda m: setattr(m.dense.index.tensors[0], "name", "z"), "not part of this run"),
        (lambda m: setattr(m.dense.index.tensors[1], "name", "a.weight"), "came twice"),
        (lambda m: setattr(m.dense, "values", b"1234"), "and 4 came"),
        (lambda m: m.dense.index.tensors.pop(), "is missing"),
        (lambda m: setattr(m.header, "run_digest", b"12"), "run_digest has 2 bytes"),
        (lambda m: setattr(m.header, "client", "x" * 1025), "client has size 1025"),
        (lambda m: setattr(m.header, "space", "x" * 65), "space has size 65"),
        (lambda m: m.header.metrics.update({str(i): 0.0 for i in range(65)}), "metrics has size"),
        (lambda m: m.header.metrics.update({"m" * 65: 0.0}), "metric's name has size 65"),
        (lambda m: [m.header.stages.add() for _ in range(31)], "stages has size 33"),
        (lambda m: m.header.stages.add(kind="k" * 65), "kind has size 65"),
        (lambda m: m.header.stages.add(parameters="p" * 4097), "parameters has size 4097"),
    ],
)
def test_a_dense_message_that_says_too_much_is_refused(change: Change, needle: str) -> None:
    assert re.search(needle, refusal(forged("dense", change)))


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        (lambda m: m.ternary.tensors.pop(), "3 compressed tensors of another layout"),
        (lambda m: setattr(m.ternary, "layout_digest", b"12345678"), "another layout"),
        (lambda m: m.ternary.tensors.__setitem__(0, m.ternary.tensors[1]), "'a.weight'.*shape"),
        (lambda m: m.ternary.tensors.__setitem__(0, m.ternary.tensors[0][:-1]), "'a.weight'.*checksum"),
        (lambda m: m.ternary.tensors.__setitem__(0, sign_of("a.weight")), "SignTensor.*no ternary"),
    ],
)
def test_a_compressed_message_that_does_not_fit_is_refused(change: Change, needle: str) -> None:
    assert re.search(needle, refusal(forged("ternary", change), "ternary"))


def sign_of(name: str) -> bytes:
    return codec.encode(codec.sign_with_scale(values()[name]))


def test_another_payload_than_the_stages_promise_is_refused() -> None:
    assert "this run's stages send sign" in refusal(encode(ENVELOPES["ternary"]), "sign")
    assert "this run's stages send dense" in refusal(encode(ENVELOPES["sign"]), "dense")
    assert "layout of its run" in refusal(encode(ENVELOPES["sign"]), "sign", layout=None)


def test_an_unknown_payload_number_is_refused() -> None:
    """Field 24, as a later version may have it: to this one it is an unknown field."""
    message = pb.Update.FromString(encode(ENVELOPES["dense"]))
    message.ClearField("dense")
    message.ClearField("checksum")
    body = message.SerializeToString() + b"\xc2\x01\x02ab"
    data = body + b"\x79" + xxhash.xxh3_64(body).digest()[::-1]
    assert "no known kind" in refusal(data)


def test_more_bytes_than_the_run_can_send_are_refused_unread() -> None:
    assert "at most" in refusal(b"\0" * (max_payload_bytes(LAYOUT) + 1))
    most = max(len(encode(ENVELOPES[payload])) for payload in PAYLOADS)
    assert most < max_payload_bytes(LAYOUT)
    full = {"x": codec.top_k(np.ones((1, 1000), np.float32), 1.0)}
    layout: Layout = {"x": ((1, 1000), "<f4")}
    body = encode(replace(ENVELOPES["sparse"], encoded=full))
    assert 4000 < len(body) < max_payload_bytes(layout)


def test_compressed_floats_for_an_exact_run_are_refused() -> None:
    layout = {**LAYOUT, "a.weight": ((6, 20), "<i8")}
    assert "exact" in refusal(encode(ENVELOPES["sign"]), "sign", layout=layout)


def test_a_sender_can_not_mix_or_misname() -> None:
    both = replace(ENVELOPES["sign"], arrays={"z": np.ones(1, np.float32)})
    with pytest.raises(UpdateError, match="plain beside compressed"):
        encode(both)
    mixed = {
        **encoded("sign", {"a": np.ones(3, np.float32)}),
        **encoded("ternary", {"b": np.ones(3, np.float32)}),
    }
    with pytest.raises(UpdateError, match="one payload"):
        encode(replace(ENVELOPES["sign"], encoded=mixed))
    with pytest.raises(UpdateError, match="float64"):
        encode(replace(ENVELOPES["dense"], arrays={"z": np.ones(1)}))
    with pytest.raises(UpdateError, match="64 hex digits"):
        encode(replace(ENVELOPES["dense"], run_digest="run-7"))


def test_a_state_without_a_layout_is_checked_against_itself() -> None:
    data = forged("dense", lambda m: m.dense.index.tensors[2].shape.__setitem__(1, 2**40))
    assert "c.empty" in refusal(data, layout=None)
    wide = forged("dense", lambda m: m.dense.index.tensors[0].shape.extend([1] * 8))
    assert "8 dimensions" in refusal(wide, layout=None)


def test_the_layout_digest_is_of_names_types_and_shapes() -> None:
    message = pb.Update.FromString(encode(envelope("sign", {"w": np.ones((2, 3), np.float32)})))
    by_hand = hashlib.sha256(b"w\0<f4\0[2, 3]\0").digest()[:8]
    assert message.sign.layout_digest == by_hand


def test_hostile_messages_neither_crash_nor_pass() -> None:
    """The short run of `fuzz_update.py`."""
    tally = fuzz(4000, seed=7)
    attacks = {key: count for key, count in tally.items() if key != "messages"}
    assert sum(attacks.values()) == tally["messages"] == 4000
    assert tally["forged_read"] > 0, "forgeries that reach the tensors are part of the trial"
    assert min(tally[f"{attack}_refused"] for attack in ("damaged", "resealed", "forged")) > 400
