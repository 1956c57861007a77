"""A federation in a folder, a server on loopback that says who called, and calls to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import grpc

from fedpeft.credentials import (
    Authority,
    Identity,
    Material,
    PeerCheck,
    Role,
    client_roots,
    new_key,
    require_role,
)
from fedpeft.credentials.certificates import parse_certificate
from fedpeft.credentials.keys import key_pem
from fedpeft.errors import CredentialError

# Of the real clock: TLS looks at it, and whole seconds are what certificates hold.
NOW = datetime.now(UTC).replace(microsecond=0)
AGENT = Identity("hospital-1", Role.AGENT)
T = TypeVar("T")


def member(authority: Authority, identity: Identity = AGENT, now: datetime = NOW, **life: Any) -> Material:
    """A member with a key of its own and a certificate of the authority."""
    key = new_key()
    pem = authority.device(key.public_key(), identity, now, **life)
    return Material(key, parse_certificate(pem, "test"), authority.certificate)


@dataclass
class Served:
    """A server on loopback and what it saw.

    `refused` holds the messages of calls that passed the handshake and no further.
    """

    port: int
    refused: list[str] = field(default_factory=list)

    async def call(self, material: Material, *, trust: bytes | None = None) -> str:
        """Who the server says that the holder of `material` is; raises `grpc.aio.AioRpcError` if refused."""
        credentials = grpc.ssl_channel_credentials(
            trust or material.authority_pem, material.key_pem, material.certificate_pem
        )
        async with grpc.aio.secure_channel(f"127.0.0.1:{self.port}", credentials) as channel:
            answer: bytes = await channel.unary_unary("/test/Who")(b"", timeout=10)
        return answer.decode()


class _Who(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no annotations
    def __init__(self, answer: Callable[[bytes, Any], Awaitable[bytes]]) -> None:
        self._answer = answer

    def service(self, details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._answer)


def serving(
    authority: Authority,
    body: Callable[[Served], Coroutine[Any, Any, T]],
    *,
    role: Role = Role.AGENT,
    certificate: bytes | None = None,
    visitors: bool = False,
    revoked: Path | None = None,
    now: datetime = NOW,
) -> T:
    """Run `body` against a server with mutual TLS that checks each caller and its role."""
    key = new_key()
    pem = certificate or authority.server(key.public_key(), ["localhost", "127.0.0.1"], NOW)
    peers = PeerCheck(authority.certificate, revoked or authority.revoked_file)
    served = Served(0)

    async def who(request: bytes, context: Any) -> bytes:
        try:
            caller = peers.identity(context.auth_context()["x509_pem_cert"][0], now)
            require_role(caller, role)
        except CredentialError as error:
            served.refused.append(str(error))
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        return caller.uri.encode()

    async def run() -> T:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((_Who(who),))
        pair = [(key_pem(key), pem)]
        roots = client_roots(authority.certificate, visitors=visitors)
        served.port = server.add_secure_port(
            "127.0.0.1:0", grpc.ssl_server_credentials(pair, roots, require_client_auth=True)
        )
        await server.start()
        try:
            return await body(served)
        finally:
            await server.stop(0)

    return asyncio.run(run())
