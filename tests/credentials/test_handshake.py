"""Mutual TLS for real, over gRPC on loopback: who gets in, and how far the others get."""

from __future__ import annotations

import ssl
from asyncio import to_thread
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from fedpeft.credentials import (
    Authority,
    Identity,
    Material,
    Role,
    adopt,
    create_authority,
    make_request,
    new_key,
    pending_key,
    pin_authority,
    read_material,
    visitor_material,
)
from fedpeft.credentials.certificates import parse_certificate
from fedpeft.errors import CredentialError
from tests.credentials.federation import AGENT, NOW, Served, member, serving


async def refusal(served: Served, material: Material, *, trust: bytes | None = None) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await served.call(material, trust=trust)
    return refused.value.code()


def test_a_member_gets_in_by_name_and_role(authority: Authority) -> None:
    device = member(authority)
    assert serving(authority, lambda served: served.call(device)) == "fedpeft://agent/hospital-1"


def test_a_member_of_another_federation_fails_the_handshake(authority: Authority, tmp_path: Path) -> None:
    other = create_authority(tmp_path / "other", NOW)
    stranger = member(other)

    async def body(served: Served) -> grpc.StatusCode:
        return await refusal(served, stranger, trust=stranger_trusts)

    stranger_trusts = member(authority).authority_pem  # it knows the server; the server does not know it
    assert serving(authority, body) == grpc.StatusCode.UNAVAILABLE


def test_a_member_refuses_a_server_of_another_federation(authority: Authority, tmp_path: Path) -> None:
    device = member(create_authority(tmp_path / "other", NOW))

    async def body(served: Served) -> tuple[grpc.StatusCode, list[str]]:
        return await refusal(served, device), served.refused

    assert serving(authority, body) == (grpc.StatusCode.UNAVAILABLE, [])


def test_an_expired_certificate_fails_the_handshake(authority: Authority) -> None:
    device = member(authority, now=NOW - timedelta(days=400), life=timedelta(days=399))

    async def body(served: Served) -> tuple[grpc.StatusCode, list[str]]:
        return await refusal(served, device), served.refused

    assert serving(authority, body) == (grpc.StatusCode.UNAVAILABLE, [])


def test_a_certificate_that_ends_during_a_connection_is_refused_at_the_next_call(
    authority: Authority,
) -> None:
    device = member(authority, life=timedelta(days=2))

    async def body(served: Served) -> tuple[grpc.StatusCode, str]:
        return await refusal(served, device), served.refused[0]

    code, message = serving(authority, body, now=NOW + timedelta(days=3))
    assert code == grpc.StatusCode.PERMISSION_DENIED
    assert "expired" in message


def test_a_revocation_counts_at_once_on_an_open_connection(authority: Authority) -> None:
    device, other = member(authority), member(authority, Identity("hospital-2", Role.AGENT))

    async def body(served: Served) -> None:
        assert await served.call(device) == "fedpeft://agent/hospital-1"
        authority.revoke("hospital-1", NOW)
        assert await refusal(served, device) == grpc.StatusCode.PERMISSION_DENIED
        assert "revoked" in served.refused[0]
        assert await served.call(other) == "fedpeft://agent/hospital-2"

    serving(authority, body)


@pytest.mark.parametrize(
    ("holds", "needs", "allowed"),
    [
        (Role.AGENT, Role.AGENT, True),
        (Role.AGENT, Role.SUBMITTER, False),
        (Role.AGENT, Role.ADMIN, False),
        (Role.SUBMITTER, Role.AGENT, False),
        (Role.SUBMITTER, Role.SUBMITTER, True),
        (Role.SUBMITTER, Role.ADMIN, False),
        (Role.ADMIN, Role.AGENT, False),
        (Role.ADMIN, Role.SUBMITTER, True),
        (Role.ADMIN, Role.ADMIN, True),
    ],
)
def test_roles(authority: Authority, holds: Role, needs: Role, allowed: bool) -> None:
    device = member(authority, Identity("somebody", holds))

    async def body(served: Served) -> bool:
        if allowed:
            return await served.call(device) == f"fedpeft://{holds}/somebody"
        code = await refusal(served, device)
        assert code == grpc.StatusCode.PERMISSION_DENIED
        assert needs in served.refused[0]
        return False

    assert serving(authority, body, role=needs) is allowed


def test_a_server_certificate_calls_nobody(authority: Authority) -> None:
    """A stolen server key must not speak as a device: the handshake already sees what it is for."""
    key = new_key()
    pem = authority.server(key.public_key(), ["127.0.0.1"], NOW)
    thief = Material(key, parse_certificate(pem, "test"), authority.certificate)

    async def body(served: Served) -> tuple[grpc.StatusCode, list[str]]:
        return await refusal(served, thief), served.refused

    assert serving(authority, body) == (grpc.StatusCode.UNAVAILABLE, [])


def test_a_device_cannot_stand_in_for_the_server(authority: Authority) -> None:
    thief, victim = member(authority), member(authority, Identity("hospital-2", Role.AGENT))
    key_and_certificate = [(thief.key_pem, thief.certificate_pem)]

    async def body(served: Served) -> grpc.StatusCode:
        false_server = grpc.aio.server()
        credentials = grpc.ssl_server_credentials(key_and_certificate)
        served.port = false_server.add_secure_port("127.0.0.1:0", credentials)
        await false_server.start()
        try:
            return await refusal(served, victim)
        finally:
            await false_server.stop(0)

    assert serving(authority, body) == grpc.StatusCode.UNAVAILABLE


def test_first_contact_needs_a_token_and_nothing_else(authority: Authority, tmp_path: Path) -> None:
    token = authority.tokens.invite(AGENT, NOW, timedelta(days=1))

    async def body(served: Served) -> str:
        address = ("127.0.0.1", served.port)
        shown = await to_thread(ssl.get_server_certificate, address, timeout=10)
        trusted = pin_authority(token, shown.encode())
        assert trusted == authority.certificate
        visitor = visitor_material(trusted)
        assert (
            await refusal(served, visitor) == grpc.StatusCode.PERMISSION_DENIED
        )  # it got as far as the check
        pem = authority.enrol(token, make_request(pending_key(tmp_path / "device")), NOW)
        adopt(tmp_path / "device", pem, trusted)
        return await served.call(read_material(tmp_path / "device", NOW))

    assert serving(authority, body, visitors=True) == "fedpeft://agent/hospital-1"


def test_visitors_fail_the_handshake_while_nobody_is_invited(authority: Authority) -> None:
    visitor = visitor_material(authority.certificate)

    async def body(served: Served) -> tuple[grpc.StatusCode, list[str]]:
        return await refusal(served, visitor), served.refused

    assert serving(authority, body) == (grpc.StatusCode.UNAVAILABLE, [])


def test_first_contact_with_a_false_server_stops(authority: Authority, tmp_path: Path) -> None:
    token = authority.tokens.invite(AGENT, NOW, timedelta(days=1))
    other = create_authority(tmp_path / "other", NOW)

    async def body(served: Served) -> None:
        address = ("127.0.0.1", served.port)
        shown = await to_thread(ssl.get_server_certificate, address, timeout=10)
        with pytest.raises(CredentialError, match="not the one that the token is of"):
            pin_authority(token, shown.encode())

    serving(other, body)


def test_a_false_server_cannot_borrow_the_right_authority(authority: Authority, tmp_path: Path) -> None:
    """A certificate that carries the pinned authority's, and that the authority did not sign."""
    token = authority.tokens.invite(AGENT, NOW, timedelta(days=1))
    other = create_authority(tmp_path / "other", NOW)
    forger = Authority(other.folder, authority.certificate, other.key)  # its key, the victim's certificate
    forged = forger.server(new_key().public_key(), ["127.0.0.1"], NOW)
    with pytest.raises(CredentialError, match="did not issue"):
        pin_authority(token, forged)
