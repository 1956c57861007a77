"""Signed updates: nothing can be changed, moved to another round, run or client, or read in two ways."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.credentials import (
    Authority,
    Identity,
    Material,
    Role,
    UpdateHeader,
    sign_body_digest,
    sign_update,
    verify_body_digest,
    verify_update,
)
from fedpeft.credentials.signing import bytes_to_sign, length_prefixed
from fedpeft.errors import UpdateError
from tests.credentials.federation import member

HEADER = UpdateHeader("run-7", "ab" * 32, 3, "train", "hospital-1")
BODY = bytes(range(256)) * 5


@pytest.fixture
def device(authority: Authority) -> Material:
    return member(authority)


def test_an_update_is_accepted_from_its_signer(device: Material) -> None:
    signature = sign_update(device.key, HEADER, BODY)
    verify_update(device.certificate, HEADER, BODY, signature)
    verify_update(device.certificate, HEADER, memoryview(BODY), signature)


def test_the_streaming_form_is_the_same_signature(device: Material) -> None:
    digest = hashlib.sha256()
    for start in range(0, len(BODY), 100):
        digest.update(BODY[start : start + 100])
    streamed = sign_body_digest(device.key, HEADER, digest.digest(), len(BODY))
    assert streamed == sign_update(device.key, HEADER, BODY)  # no nonce drawn: the same bytes each time
    verify_body_digest(device.certificate, HEADER, digest.digest(), len(BODY), streamed)


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": "run-8"},
        {"run_digest": "ab" * 31 + "ac"},
        {"round": 4},
        {"round": 2},
        {"kind": "query.hello"},
        {"kind": ""},
    ],
    ids=["run", "run file", "later round", "earlier round", "kind", "no kind"],
)
def test_a_swapped_field_is_refused(device: Material, change: dict[str, str | int]) -> None:
    signature = sign_update(device.key, HEADER, BODY)
    with pytest.raises(UpdateError, match="signature does not fit"):
        verify_update(device.certificate, replace(HEADER, **change), BODY, signature)  # type: ignore[arg-type]


def test_an_update_in_anothers_name_is_refused(authority: Authority, device: Material) -> None:
    other = member(authority, Identity("hospital-2", Role.AGENT))
    in_others_name = replace(HEADER, client="hospital-2")
    with pytest.raises(UpdateError, match="certificate of 'hospital-1'"):
        verify_update(device.certificate, in_others_name, BODY, sign_update(device.key, in_others_name, BODY))
    with pytest.raises(UpdateError, match="signature does not fit"):
        verify_update(other.certificate, in_others_name, BODY, sign_update(device.key, in_others_name, BODY))
    with pytest.raises(UpdateError, match="signature does not fit"):  # its own, as the other's
        verify_update(other.certificate, in_others_name, BODY, sign_update(device.key, HEADER, BODY))


def test_every_changed_byte_is_refused(device: Material) -> None:
    signature = sign_update(device.key, HEADER, BODY)
    flipped = [BODY[:at] + bytes((BODY[at] ^ 1,)) + BODY[at + 1 :] for at in range(0, len(BODY), 61)]
    for body in [*flipped, BODY[:-1], BODY + b"\0", b""]:
        with pytest.raises(UpdateError, match="signature does not fit"):
            verify_update(device.certificate, HEADER, body, signature)


def test_every_changed_byte_of_the_signature_is_refused(device: Material) -> None:
    signature = sign_update(device.key, HEADER, BODY)
    for position in range(len(signature)):
        forged = bytearray(signature)
        forged[position] ^= 1
        with pytest.raises(UpdateError, match="signature does not fit"):
            verify_update(device.certificate, HEADER, BODY, bytes(forged))
    for forged_whole in (b"", signature[:-1], signature + b"\0", b"\0" * 1_000_000):
        with pytest.raises(UpdateError, match="signature does not fit"):
            verify_update(device.certificate, HEADER, BODY, forged_whole)


def test_the_length_goes_under_the_signature(device: Material) -> None:
    digest = hashlib.sha256(BODY).digest()
    signature = sign_body_digest(device.key, HEADER, digest, len(BODY))
    with pytest.raises(UpdateError, match="signature does not fit"):
        verify_body_digest(device.certificate, HEADER, digest, len(BODY) + 1, signature)


def test_numbers_and_digests_that_cannot_be_are_refused(device: Material) -> None:
    digest = hashlib.sha256(BODY).digest()
    for header, given_digest, size in (
        (replace(HEADER, round=-1), digest, 5),
        (replace(HEADER, round=2**63), digest, 5),
        (HEADER, digest, -1),
        (HEADER, digest[:-1], 5),
        (HEADER, b"", 5),
    ):
        with pytest.raises(UpdateError):
            sign_body_digest(device.key, header, given_digest, size)


def test_what_is_signed_byte_for_byte() -> None:
    """Written out by hand: a change of it would make old and new agents refuse each other."""
    header = UpdateHeader("r", "d", 258, "train", "c")
    number = struct.Struct("<Q").pack
    expected = (
        number(8)
        + number(27) + b"fedpeft update signature v2"
        + number(1) + b"r"
        + number(1) + b"d"
        + number(8) + b"\x02\x01\0\0\0\0\0\0"
        + number(5) + b"train"
        + number(1) + b"c"
        + number(8) + b"\x05\0\0\0\0\0\0\0"
        + number(32) + bytes(range(32))
    )  # fmt: skip
    assert bytes_to_sign(header, bytes(range(32)), 5) == expected


FIELDS = st.lists(st.binary(max_size=12), max_size=5)


@given(FIELDS, FIELDS)
def test_different_fields_never_give_the_same_bytes(first: list[bytes], second: list[bytes]) -> None:
    assert (length_prefixed(first) == length_prefixed(second)) == (first == second)


@given(FIELDS)
def test_the_fields_can_be_read_back(fields: list[bytes]) -> None:
    """Which says the same of any two sequences, not only of those that were drawn together."""
    content = length_prefixed(fields)
    (count,) = struct.unpack_from("<Q", content)
    place, found = 8, []
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", content, place)
        found.append(content[place + 8 : place + 8 + length])
        place += 8 + length
    assert (found, place) == (fields, len(content))


@given(st.binary(max_size=6), st.binary(max_size=6), st.binary(max_size=6), st.integers(0, 6))
def test_moving_a_border_changes_the_bytes(a: bytes, b: bytes, c: bytes, cut: int) -> None:
    """The attack on plain concatenation: the same characters, shared out differently."""
    joined = a + b
    moved = [joined[:cut], joined[cut:], c]
    assert (length_prefixed([a, b, c]) == length_prefixed(moved)) == ([a, b, c] == moved)
