"""Issuing, renewing and revoking; what other implementations make of the certificates."""

from __future__ import annotations

import ssl
from datetime import timedelta
from pathlib import Path

import pytest

from fedpeft.credentials import (
    Authority,
    Identity,
    Material,
    PeerCheck,
    Role,
    create_authority,
    expiry_warning,
    identity_of,
    make_request,
    new_key,
    open_authority,
    renewal_due,
    visitor_material,
)
from fedpeft.credentials.certificates import certificate_pem, parse_certificate
from fedpeft.credentials.issuing import server_hosts
from fedpeft.errors import CredentialError
from tests.credentials.federation import AGENT, NOW, member

DAY = timedelta(days=1)


def shake_hands(authority: Authority, device: Material, folder: Path) -> None:
    """A handshake in memory by Python's ssl (OpenSSL), which reads the revocation list itself.

    Raises:
        ssl.SSLCertVerificationError: as OpenSSL sees it.
    """
    key = new_key()
    server_pem = authority.server(key.public_key(), ["server.test"], NOW)
    server = Material(key, parse_certificate(server_pem, "test"), authority.certificate)
    contexts = []
    for kind, material in (("server", server), ("client", device)):
        pair = folder / f"{kind}.pem"
        pair.write_bytes(material.key_pem + material.certificate_pem)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if kind == "server" else ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(pair)
        context.load_verify_locations(cadata=certificate_pem(authority.certificate).decode())
        contexts.append(context)
    contexts[0].verify_mode = ssl.CERT_REQUIRED
    contexts[0].load_verify_locations(cafile=str(authority.revoked_file))
    contexts[0].verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF | ssl.VERIFY_X509_STRICT
    contexts[1].verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        contexts[0].wrap_bio(up, down, server_side=True),
        contexts[1].wrap_bio(down, up, server_hostname="server.test"),
    ]
    for _ in range(4):
        for end in reversed(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    for end in ends:
        assert end.getpeercert()


def test_openssl_accepts_our_certificates_strictly_and_our_list_revokes(
    authority: Authority, tmp_path: Path
) -> None:
    device, other = member(authority), member(authority, Identity("hospital-2", Role.AGENT))
    shake_hands(authority, device, tmp_path)
    authority.revoke("hospital-1", NOW)
    with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
        shake_hands(authority, device, tmp_path)
    shake_hands(authority, other, tmp_path)


def test_an_authority_is_found_again_and_never_replaced(authority: Authority) -> None:
    assert open_authority(authority.folder).certificate == authority.certificate
    with pytest.raises(CredentialError, match="holds an authority already"):
        create_authority(authority.folder, NOW)
    assert open_authority(authority.folder).certificate == authority.certificate


def test_an_authority_with_a_list_of_another_is_refused(authority: Authority, tmp_path: Path) -> None:
    other = create_authority(tmp_path / "other", NOW)
    authority.revoked_file.write_bytes(other.revoked_file.read_bytes())
    with pytest.raises(CredentialError, match="no revocation list of this authority"):
        open_authority(authority.folder)


def test_a_server_serves_the_hosts_that_were_given(authority: Authority) -> None:
    hosts = ["Server.Example", "10.0.0.7", "::1"]
    issued = parse_certificate(authority.server(new_key().public_key(), hosts, NOW), "test")
    assert server_hosts(issued) == ["server.example", "10.0.0.7", "::1"]


@pytest.mark.parametrize(
    "hosts", [[], ["http://x"], ["x:443"], ["*.example"], ["a..b"], ["-a"], ["ä"], ["x" * 64]]
)
def test_what_is_no_host_is_refused(authority: Authority, hosts: list[str]) -> None:
    with pytest.raises(CredentialError, match="host"):
        authority.server(new_key().public_key(), hosts, NOW)


def test_a_name_is_one_device(authority: Authority) -> None:
    """Who gets the name anew takes it from who had it."""
    peers = PeerCheck(authority.certificate, authority.revoked_file)
    first = member(authority)
    assert peers.identity(first.certificate_pem, NOW) == AGENT
    second = member(authority)
    assert peers.identity(second.certificate_pem, NOW) == AGENT
    with pytest.raises(CredentialError, match="revoked"):
        peers.identity(first.certificate_pem, NOW)


def test_renewal_keeps_name_and_role_and_leaves_the_old_certificate_until_it_ends(
    authority: Authority,
) -> None:
    device = member(authority, life=30 * DAY)
    key, late = new_key(), NOW + 25 * DAY
    renewed = authority.renew(device.certificate_pem, make_request(key), late, 30 * DAY)
    peers = PeerCheck(authority.certificate, authority.revoked_file)
    assert peers.identity(renewed, late) == peers.identity(device.certificate_pem, late) == AGENT
    assert peers.identity(renewed, NOW + 50 * DAY) == AGENT
    with pytest.raises(CredentialError, match="expired"):
        peers.identity(device.certificate_pem, NOW + 31 * DAY)


def test_renewal_again_with_the_same_key_gives_the_same_and_with_another_is_a_theft(
    authority: Authority,
) -> None:
    device = member(authority, life=30 * DAY)
    request, late = make_request(new_key()), NOW + 25 * DAY
    first = authority.renew(device.certificate_pem, request, late)
    assert authority.renew(device.certificate_pem, request, late) == first
    with pytest.raises(CredentialError, match="renewed before, with another key"):
        authority.renew(device.certificate_pem, make_request(new_key()), late)


def test_renewal_is_refused_early_late_and_after_revocation(authority: Authority, tmp_path: Path) -> None:
    device = member(authority, life=30 * DAY)
    request = make_request(new_key())
    for now, complaint in ((NOW + 5 * DAY, "can be renewed from"), (NOW + 31 * DAY, "expired")):
        with pytest.raises(CredentialError, match=complaint):
            authority.renew(device.certificate_pem, request, now)
    stranger = member(create_authority(tmp_path / "other", NOW))
    with pytest.raises(CredentialError, match="not of this federation"):
        authority.renew(stranger.certificate_pem, request, NOW)
    visitor = visitor_material(authority.certificate)
    with pytest.raises(CredentialError, match="not of this federation"):
        authority.renew(visitor.certificate_pem, request, NOW)
    authority.revoke("hospital-1", NOW)
    with pytest.raises(CredentialError, match="revoked"):
        authority.renew(device.certificate_pem, request, NOW + 25 * DAY)


def test_who_is_revoked_until_a_new_certificate(authority: Authority) -> None:
    member(authority)
    assert authority.list_revoked(NOW) == frozenset()
    authority.revoke("hospital-1", NOW)
    assert authority.list_revoked(NOW) == {"hospital-1"}
    member(authority)  # invited anew
    assert authority.list_revoked(NOW) == frozenset()
    authority.revoke("hospital-1", NOW)
    assert authority.list_revoked(NOW + 5000 * DAY) == frozenset(), "they ended by themselves meanwhile"


def test_revoking_takes_tokens_too(authority: Authority) -> None:
    """Else a revoked device that kept its token would be back at once."""
    token = authority.tokens.invite(AGENT, NOW, DAY)
    request = make_request(new_key())
    authority.enrol(token, request, NOW)
    authority.revoke("hospital-1", NOW)
    with pytest.raises(CredentialError, match="not known"):
        authority.enrol(token, request, NOW)
    with pytest.raises(CredentialError, match="no certificate and no token"):
        authority.revoke("hospital-1", NOW)


def test_the_list_forgets_certificates_that_ended_by_themselves(authority: Authority) -> None:
    short = member(authority, life=10 * DAY)
    authority.revoke("hospital-1", NOW)
    peers = PeerCheck(authority.certificate, authority.revoked_file)
    with pytest.raises(CredentialError, match="revoked"):
        peers.identity(short.certificate_pem, NOW)
    member(authority, Identity("hospital-2", Role.AGENT))
    before = authority.revoked_file.stat().st_size
    authority.revoke("hospital-2", NOW + 20 * DAY)
    assert authority.revoked_file.stat().st_size <= before  # one out, one in
    with pytest.raises(CredentialError, match="expired"):
        peers.identity(short.certificate_pem, NOW + 20 * DAY)


def test_an_older_or_missing_list_lets_nobody_in(authority: Authority) -> None:
    device = member(authority)
    old = authority.revoked_file.read_bytes()
    other = Identity("hospital-2", Role.AGENT)
    member(authority, other)
    authority.revoke("hospital-2", NOW)
    peers = PeerCheck(authority.certificate, authority.revoked_file)
    newest = authority.revoked_file.read_bytes()
    authority.revoked_file.write_bytes(old)
    with pytest.raises(CredentialError, match="older than list"):
        peers.identity(device.certificate_pem, NOW)
    authority.revoked_file.unlink()
    with pytest.raises(CredentialError, match="missing"):
        peers.identity(device.certificate_pem, NOW)
    authority.revoked_file.write_bytes(newest)
    assert peers.identity(device.certificate_pem, NOW) == AGENT


def test_peers_that_are_no_members_are_refused(authority: Authority) -> None:
    peers = PeerCheck(authority.certificate, authority.revoked_file)
    server = authority.server(new_key().public_key(), ["x"], NOW)
    visitor = visitor_material(authority.certificate).certificate_pem
    for pem, complaint in (
        (certificate_pem(authority.certificate), "authority itself|no name and role"),
        (server, "no name and role"),
        (visitor, "not of this federation"),
        (b"", "no certificate"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "no certificate"),
        (b"x" * 100_000, "no certificate"),
    ):
        with pytest.raises(CredentialError, match=complaint):
            peers.identity(pem, NOW)


def test_warnings_come_in_time(authority: Authority) -> None:
    certificate = member(authority, life=90 * DAY).certificate
    assert expiry_warning(certificate, NOW + 75 * DAY, "x") is None
    assert "expires in 13 days" in (expiry_warning(certificate, NOW + 77 * DAY, "x") or "")
    assert "has expired" in (expiry_warning(certificate, NOW + 91 * DAY, "x") or "")
    assert [renewal_due(certificate, NOW + days * DAY) for days in (0, 59, 61)] == [False, False, True]
    assert identity_of(certificate) == AGENT
