"""Enrolment tokens: one use, an end, one name; nothing on the disk from which a token could be made."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.x509.oid import NameOID

from fedpeft.credentials import (
    Authority,
    Identity,
    Role,
    create_authority,
    identity_of,
    make_request,
    new_key,
    open_authority,
)
from fedpeft.credentials.certificates import fingerprint, parse_certificate
from fedpeft.credentials.keys import public_der
from fedpeft.errors import CredentialError
from tests.credentials.federation import AGENT, NOW

DAY = timedelta(days=1)


def decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=")


def test_a_token_is_256_random_bits_and_the_authoritys_fingerprint(authority: Authority) -> None:
    first, second = (authority.tokens.invite(AGENT, NOW, DAY) for _ in range(2))
    mark, secret, pinned = first.split(".")
    assert mark == "fpt1"
    assert len(decoded(secret)) == 32
    assert decoded(pinned) == fingerprint(authority.certificate)
    assert first != second


def test_only_a_hash_is_kept_and_only_its_owner_may_read_it(authority: Authority) -> None:
    token = authority.tokens.invite(AGENT, NOW, DAY)
    secret = token.split(".")[1]
    files = [path for path in authority.folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        assert secret.encode() not in content
        assert decoded(secret) not in content
        assert decoded(secret).hex().encode() not in content
    (record,) = (authority.folder / "tokens").glob("*.token")
    assert json.loads(record.read_text())["secret_sha256"] == hashlib.sha256(decoded(secret)).hexdigest()
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    assert stat.S_IMODE(record.parent.stat().st_mode) == 0o700


def test_a_certificate_says_what_the_token_says_and_not_what_the_device_asks(authority: Authority) -> None:
    key = new_key()
    wish = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, "root"),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "admin"),
        ]
    )
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(wish)
        .add_extension(x509.BasicConstraints(ca=True, path_length=3), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier("fedpeft://admin/root")]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    token = authority.tokens.invite(AGENT, NOW, DAY)
    issued = parse_certificate(authority.enrol(token, request, NOW), "test")
    assert identity_of(issued) == AGENT
    assert issued.subject.rfc4514_string() == "CN=hospital-1"
    assert not issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert b"admin" not in issued.public_bytes(serialization.Encoding.DER)


def test_a_token_is_spent_on_one_key(authority: Authority) -> None:
    token = authority.tokens.invite(AGENT, NOW, DAY)
    request = make_request(new_key())
    first = authority.enrol(token, request, NOW)
    assert authority.enrol(token, request, NOW) == first  # killed before the answer came: the same again
    with pytest.raises(CredentialError, match="used before, by another device"):
        authority.enrol(token, make_request(new_key()), NOW)


def test_a_token_ends(authority: Authority) -> None:
    token = authority.tokens.invite(AGENT, NOW, DAY)
    request = make_request(new_key())
    with pytest.raises(CredentialError, match="expired"):
        authority.enrol(token, request, NOW + DAY)
    authority.enrol(token, request, NOW + DAY - timedelta(seconds=1))
    with pytest.raises(CredentialError, match="expired"):  # also for the device that used it
        authority.enrol(token, request, NOW + DAY)


def test_a_request_that_is_none_leaves_the_token_unspent(authority: Authority) -> None:
    token = authority.tokens.invite(AGENT, NOW, DAY)
    good = make_request(new_key())
    der = bytearray(x509.load_pem_x509_csr(good).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1  # in the signature
    forged = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    other_kind = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(ed25519.Ed25519PrivateKey.generate(), None)
        .public_bytes(serialization.Encoding.PEM)
    )
    for request in (b"", b"not PEM", forged, other_kind, good + b" " * 20_000):
        with pytest.raises(CredentialError, match="no certificate signing request"):
            authority.enrol(token, request, NOW)
    assert authority.tokens.open_at(NOW)
    authority.enrol(token, good, NOW)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda token: token[:-1],
        lambda token: token.replace("fpt1", "fpt2"),
        lambda token: token.split(".")[1],
        lambda token: "",
        lambda token: token + "." + token,
        lambda token: "é" * 90,
        lambda token: "x" * 1_000_000,
        lambda token: f"fpt1.{'A' * 43}.{token.split('.')[2]}",  # another secret
        lambda token: f"fpt1.{token.split('.')[1]}.{'A' * 43}",  # another federation
        lambda token: f"fpt1.{token.split('.')[1].swapcase()}.{token.split('.')[2]}",
    ],
)
def test_what_is_no_token_of_ours_is_refused_and_not_repeated(
    authority: Authority, spoil: Callable[[str], str]
) -> None:
    token = authority.tokens.invite(AGENT, NOW, DAY)
    spoiled = spoil(token)
    with pytest.raises(CredentialError) as refused:
        authority.enrol(spoiled, make_request(new_key()), NOW)
    for part in (*token.split("."), *[piece for piece in spoiled.split(".") if len(piece) > 10]):
        assert part not in str(refused.value) or part == "fpt1"
    authority.enrol(token, make_request(new_key()), NOW)  # and the token itself is still good


def test_a_token_of_another_federation_is_refused(authority: Authority, tmp_path: Path) -> None:
    other = create_authority(tmp_path / "other", NOW)
    with pytest.raises(CredentialError, match="another federation"):
        authority.enrol(other.tokens.invite(AGENT, NOW, DAY), make_request(new_key()), NOW)


def test_of_many_devices_at_once_one_gets_the_token(authority: Authority) -> None:
    token = authority.tokens.invite(AGENT, NOW, DAY)
    keys = [public_der(new_key().public_key()) for _ in range(16)]
    start, won, refused = threading.Barrier(len(keys)), [], []

    def redeem(key: bytes) -> None:
        start.wait()
        try:
            authority.tokens.redeem(token, key, NOW)
            won.append(key)
        except CredentialError:
            refused.append(key)

    threads = [threading.Thread(target=redeem, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 15)


def test_the_door_is_open_to_whoever_holds_a_token(authority: Authority) -> None:
    """Also after it was used, for the answer may have been lost, and after its end, to say so."""
    tokens = authority.tokens
    assert not tokens.open_at(NOW)
    token = tokens.invite(AGENT, NOW, DAY)
    assert tokens.open_at(NOW)
    authority.enrol(token, make_request(new_key()), NOW)
    assert tokens.open_at(NOW)
    assert [tokens.open_at(NOW + days * DAY) for days in (7, 8)] == [True, False]
    tokens.withdraw(AGENT.name)
    assert not tokens.open_at(NOW)


def test_the_door_sees_what_another_process_writes(authority: Authority) -> None:
    """The answer is kept between handshakes, for a folder that has not changed for a while."""
    folder = authority.folder / "tokens"
    watching, writing = (open_authority(authority.folder).tokens for _ in range(2))
    long_ago = 1_000_000_000
    writing.invite(AGENT, NOW, DAY)
    os.utime(folder, (long_ago, long_ago))
    assert [watching.open_at(NOW) for _ in range(2)] == [True, True]
    assert not watching.open_at(NOW + 8 * DAY)
    writing.withdraw(AGENT.name)
    assert not watching.open_at(NOW)
    os.utime(folder, (long_ago + 1, long_ago + 1))
    assert not watching.open_at(NOW)
    writing.invite(AGENT, NOW, DAY)
    assert watching.open_at(NOW)


def test_a_token_is_compared_whole(authority: Authority) -> None:
    """A record is found by a part of the hash; the rest has to fit too."""
    token = authority.tokens.invite(AGENT, NOW, DAY)
    (record,) = (authority.folder / "tokens").glob("*.token")
    digest = json.loads(record.read_text())["secret_sha256"]
    record.write_text(record.read_text().replace(digest, digest[:16] + "0" * 48))
    with pytest.raises(CredentialError, match="not known"):
        authority.enrol(token, make_request(new_key()), NOW)


def test_old_records_are_forgotten_and_others_kept(authority: Authority) -> None:
    tokens = authority.tokens
    tokens.invite(AGENT, NOW, DAY)
    later = tokens.invite(Identity("hospital-2", Role.AGENT), NOW, 10 * DAY)
    assert tokens.forget_expired(NOW + 2 * DAY) == 0
    assert tokens.forget_expired(NOW + 8 * DAY) == 1
    assert [grant.identity.name for grant in tokens.outstanding(NOW)] == ["hospital-2"]
    authority.enrol(later, make_request(new_key()), NOW + 8 * DAY)


@pytest.mark.parametrize("life", [timedelta(0), -DAY, 31 * DAY])
def test_a_life_that_cannot_be_is_refused(authority: Authority, life: timedelta) -> None:
    with pytest.raises(CredentialError, match="life"):
        authority.tokens.invite(AGENT, NOW, life)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b", "a\n", "ä", "-x", "x" * 64, "*"])
def test_a_name_that_cannot_be_is_refused(authority: Authority, name: str) -> None:
    with pytest.raises(CredentialError, match="cannot be used"):
        authority.tokens.invite(Identity(name, Role.AGENT), NOW, DAY)
