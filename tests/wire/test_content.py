"""Contents of messages: typed values by name, the large ones read without protobuf's copies."""

from __future__ import annotations

import os

import pytest

from fedpeft.errors import UpdateError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.wire.content import MAX_ENTRIES, MAX_RECORDS, Value, decode_content, encode_content

LARGE = os.urandom(200_000)
RECORDS: dict[str, dict[str, Value]] = {
    "update": {"payload": LARGE, "again": LARGE[::-1], "text": "x" * 100_000, "number": -1.5, "flag": True},
    "small": {"integer": -(2**63), "empty": b"", "text": "ä"},
    "zero": {},
}


@pytest.mark.parametrize("kind", [bytes, memoryview, bytearray])
def test_what_is_encoded_comes_back_with_its_types(kind: type) -> None:
    came = decode_content(kind(encode_content(RECORDS)), who="x")
    assert came == RECORDS
    assert {type(value) for value in came["update"].values()} == {bytes, str, float, bool}


def test_nothing_refers_to_the_bytes_that_came() -> None:
    buffer = bytearray(encode_content(RECORDS))
    came = decode_content(memoryview(buffer), who="x")
    buffer[:] = bytes(len(buffer))
    buffer.clear()  # refused while a view of it is alive
    assert came == RECORDS


def message(*entries: pb.Entry, name: str = "r") -> bytes:
    return pb.Content(records=[pb.Record(name=name, entries=entries)]).SerializeToString()


def large(name: str, data: bytes = LARGE) -> pb.Entry:
    return pb.Entry(name=name, data=data)


def doubled(body: bytes) -> bytes:
    """An entry with two values, which protobuf's own writer cannot make."""
    value = pb.Entry(name="a", data=LARGE).SerializeToString() + pb.Entry(integer=1).SerializeToString()
    record = b"\x12" + _varint(len(value)) + value
    return b"\x0a" + _varint(len(record)) + record + body


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (message(large("a"), large("a")), "name twice"),
        (message(large("a"), pb.Entry(name="a", integer=1)), "name twice"),
        (message(large("a")) + message(pb.Entry(name="b", integer=1)), "name twice"),
        (doubled(b""), "came twice"),
        (message(large("a"), pb.Entry(name="b")), "no type"),
        (message(large("a"), *(pb.Entry(name=f"{n}", flag=True) for n in range(MAX_ENTRIES))), "1025 values"),
        (b"".join(message(large("a"), name=f"{n}") for n in range(MAX_RECORDS + 1)), "65 records"),
        (message(large("a"))[:-1], "no content"),
        (message(large("a")) + b"\x0a", "no content"),
        (message(large("a"))[1:], "no content"),
        (message(large("a", LARGE), name="r").replace(b"\x0a\x01r", b"\x0a\x01\xff"), "no content"),
        (os.urandom(100_000), "no content"),
    ],
)
def test_what_is_no_content_is_refused_in_one_line(content: bytes, why: str) -> None:
    with pytest.raises(UpdateError, match=why) as caught:
        decode_content(content, who="agent-7")
    assert str(caught.value).startswith("agent-7: ")
    assert "\n" not in str(caught.value)


def test_cut_anywhere_it_is_refused_or_smaller() -> None:
    whole = encode_content({"r": {"data": LARGE, "n": 5}})
    for end in (*range(40), *range(len(whole) - 40, len(whole))):
        try:
            came = decode_content(whole[:end], who="x")
        except UpdateError:
            continue
        assert came != {"r": {"data": LARGE, "n": 5}}
