"""Who calls: by certificate, or by their own word where that is allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

from fedpeft.credentials import (
    Identity,
    PeerCheck,
    Role,
    UpdateHeader,
    check_name,
    require_role,
    verify_body_digest,
)
from fedpeft.errors import CredentialError, FedPEFTError
from fedpeft_server.store.contracts import ReceivedResult

LOCAL = "@local"  # whoever calls without certificates; no certificate has that name
ADDRESS = "@"  # begins the name of a share that is an address's; no certificate's name does


class Context(Protocol):
    """What is needed of a gRPC call's context."""

    def auth_context(self) -> Any:
        """Properties of the peer, each a list of bytes."""
        ...

    def peer(self) -> str:
        """Address."""
        ...


@dataclass(frozen=True)
class Caller:
    """An agent on a connection.

    Attributes:
        name: under which it is known.
        certificate: PEM; empty without TLS.
        certificate_ends: None without TLS.
    """

    name: str
    certificate: bytes = b""
    certificate_ends: datetime | None = None


class Gate(Protocol):
    """Decides who may do what."""

    def agent(self, context: Context, claimed: str) -> Caller:
        """The agent that calls.

        Args:
            claimed: the name that it gives itself; it must be the certificate's where there is one.

        Raises:
            CredentialError: it may not come in.
        """
        ...

    def require(self, context: Context, role: Role) -> Identity:
        """Anyone with a role that covers `role`; raises as `agent`."""
        ...

    def identity(self, context: Context) -> Identity | None:
        """Who calls, whatever its role; None: nobody with a certificate that counts."""
        ...

    def share(self, context: Context) -> str:
        """Whose share of the server a call uses: a certificate's name, else an address after `ADDRESS`."""
        ...

    def still(self, caller: Caller) -> None:
        """Check again that an agent whose session is open may be here; cheap.

        Raises:
            CredentialError: no longer: its certificate was revoked or has ended.
        """
        ...

    def verify(self, caller: Caller, arrival: ReceivedResult) -> None:
        """Check a result's signature.

        Raises:
            UpdateError: it is not by this agent, or over something else.
        """
        ...


class OpenGate:
    """Plaintext on loopback: everyone on the machine is believed. Refused elsewhere by `serve`."""

    def agent(self, context: Context, claimed: str) -> Caller:
        """See `Gate`."""
        return Caller(check_name(claimed))

    def require(self, context: Context, role: Role) -> Identity:
        """See `Gate`: everyone may do everything."""
        return Identity(LOCAL, Role.ADMIN)

    def identity(self, context: Context) -> Identity | None:
        """See `Gate`."""
        return Identity(LOCAL, Role.ADMIN)

    def share(self, context: Context) -> str:
        """See `Gate`: each connection has one, as all come from one host."""
        return ADDRESS + context.peer()

    def still(self, caller: Caller) -> None:
        """Nobody is ever sent away."""

    def verify(self, caller: Caller, arrival: ReceivedResult) -> None:
        """There are no keys without certificates."""


class CertificateGate:
    """Names and roles by certificate, checked at every call."""

    def __init__(self, peers: PeerCheck, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._peers, self._now = peers, now

    def agent(self, context: Context, claimed: str) -> Caller:
        """See `Gate`."""
        who = self.require(context, Role.AGENT)
        if claimed not in ("", who.name):
            raise CredentialError(
                f"the agent calls itself {claimed[:64]!r}, its certificate {who.name!r}; leave --name out"
            )
        shown = certificate_of(context)
        ends = self._peers.certificate(shown, self._now()).not_valid_after_utc
        return Caller(who.name, shown, ends)

    def require(self, context: Context, role: Role) -> Identity:
        """See `Gate`."""
        who = self._peers.identity(certificate_of(context), self._now())
        require_role(who, role)
        return who

    def identity(self, context: Context) -> Identity | None:
        """See `Gate`."""
        try:
            return self._peers.identity(certificate_of(context), self._now())
        except FedPEFTError:
            return None

    def share(self, context: Context) -> str:
        """See `Gate`: visitors, who have no certificate yet, share their host's."""
        try:
            return self._peers.identity(certificate_of(context), self._now()).name
        except FedPEFTError:
            return ADDRESS + context.peer().rpartition(":")[0]

    def still(self, caller: Caller) -> None:
        """See `Gate`."""
        self._peers.certificate(caller.certificate, self._now())

    def verify(self, caller: Caller, arrival: ReceivedResult) -> None:
        """See `Gate`."""
        certificate = self._peers.certificate(caller.certificate, self._now())
        header = UpdateHeader(arrival.run, arrival.run_digest, arrival.round, arrival.kind, arrival.agent)
        verify_body_digest(
            certificate, header, bytes.fromhex(arrival.digest), arrival.size, arrival.signature
        )


def certificate_of(context: Context) -> bytes:
    """The certificate that the caller showed in the handshake, PEM.

    Raises:
        CredentialError: none.
    """
    shown = context.auth_context().get("x509_pem_cert")
    if not shown:
        raise CredentialError("the caller shows no certificate; enrol first")
    return bytes(shown[0])
