"""TLS with certificates on both sides, and the one call that someone without a certificate may make."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc

from fedpeft.credentials import Authority, Material, PeerCheck, client_roots, identity_of, read_material
from fedpeft.credentials.certificates import parse_certificate
from fedpeft.credentials.material import CERTIFICATE_FILE, KEY_FILE
from fedpeft.errors import CredentialError, FedPEFTError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_server.transport.callers import CertificateGate, Gate, OpenGate, certificate_of

LOG = logging.getLogger("fedpeft.server")
Enrol = Callable[[pb.EnrollRequest, Any], pb.EnrollReply]  # the request and the call's context
Now = Callable[[], datetime]


def _utc() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class Doors:
    """Who is let in, and how.

    Attributes:
        gate: names and roles of callers.
        credentials: gRPC's, for TLS; None: plaintext, which only a loopback address takes.
        enrol: what `Enroll` does; None where there are no certificates.
        ends: when the server's own certificate ends, as it is now; None where there is none.
    """

    gate: Gate = field(default_factory=OpenGate)
    credentials: grpc.ServerCredentials | None = None
    enrol: Enrol | None = None
    ends: Callable[[], datetime | None] = lambda: None


def certificate_doors(
    material: Material,
    peers: PeerCheck,
    authority: Authority | None,
    now: Now = _utc,
    keys: Path | None = None,
) -> Doors:
    """Mutual TLS.

    Args:
        material: the server's own.
        peers: who of those with a certificate is let in.
        authority: signs for those who bring a token or renew; None: certificates come from elsewhere, and
            nobody without one gets through the handshake.
        keys: the folder that `material` is of; when it is renewed there, new connections get the new one.
    """
    enrol = None if authority is None else Enrolment(authority, peers, now)
    own = _Own(material, keys, now)
    return Doors(CertificateGate(peers, now), _credentials(own, authority, now), enrol, own.ends)


class Enrolment:
    """What `Enroll` does: a token's certificate, or without a token the caller's own, renewed."""

    def __init__(self, authority: Authority, peers: PeerCheck, now: Now) -> None:
        self._authority, self._peers, self._now = authority, peers, now

    def __call__(self, request: pb.EnrollRequest, context: Any) -> pb.EnrollReply:
        """Answer one request; on a thread.

        Raises:
            CredentialError: token, certificate or request are refused.
            StorageError: the certificate cannot be recorded.
        """
        now = self._now()
        if request.token:
            issued = self._authority.enrol(request.token, request.csr, now)
        else:
            shown = certificate_of(context)
            self._peers.identity(shown, now)
            issued = self._authority.renew(shown, request.csr, now)
        name = identity_of(parse_certificate(issued, "the issued certificate")).name
        return pb.EnrollReply(
            name=name,
            certificate=issued,
            ca_certificate=client_roots(self._authority.certificate, visitors=False),
        )


class _Own:
    """The server's key and certificate as gRPC takes them, with visitors among the callers or without.

    Read again when the certificate's file changes, which `--renew-server` writes last but for the key's name.
    """

    def __init__(self, material: Material, keys: Path | None, now: Now) -> None:
        self._folder, self._now, self._authority = keys, now, material.authority
        self._roots = {
            visitors: client_roots(self._authority, visitors=visitors) for visitors in (False, True)
        }
        self._lock = threading.Lock()
        self._stamp = self._file_times()
        self._made = self._configure(material)

    def ends(self) -> datetime:
        """When the certificate that new connections get ends."""
        return self._ends

    def configuration(self, *, visitors: bool) -> Any:
        """For one handshake; on gRPC's threads."""
        with self._lock:
            if (seen := self._file_times()) != self._stamp:
                self._stamp = seen
                self._read()
            return self._made[visitors]

    def _read(self) -> None:
        try:
            material = read_material(self._folder or Path(), self._now())
            if material.authority != self._authority:
                raise CredentialError("it is of another authority; restart the server to change federations")
        except FedPEFTError as error:
            LOG.warning("the server's changed certificate is not used: %s", error)
            return
        self._made = self._configure(material)
        LOG.info("new connections get the server's new certificate")

    def _configure(self, material: Material) -> dict[bool, Any]:
        self._ends = material.certificate.not_valid_after_utc
        pair = (material.key_pem, material.certificate_pem)
        return {
            visitors: grpc.ssl_server_certificate_configuration([pair], roots)
            for visitors, roots in self._roots.items()
        }

    def _file_times(self) -> tuple[tuple[int, int], ...]:
        try:
            files = (
                [] if self._folder is None else [self._folder / name for name in (KEY_FILE, CERTIFICATE_FILE)]
            )
            return tuple((status.st_ino, status.st_mtime_ns) for status in map(os.stat, files))
        except OSError:  # half-way through being replaced
            return ()


def _credentials(own: _Own, authority: Authority | None, now: Now) -> grpc.ServerCredentials:
    """Visitors, who have no certificate, get through the handshake only while a token waits for one.

    gRPC is given a configuration only when it is another one than before. It puts each that it is given in
    the place of the last without asking whether a handshake on another thread is reading that one: given at
    every handshake, as its interface would have it, two at the same time end the process.
    """
    lock = threading.Lock()

    def wanted() -> Any:
        try:
            visitors = authority is not None and authority.tokens.open_at(now())
        except FedPEFTError:  # an unreadable folder of tokens lets nobody in
            visitors = False
        return own.configuration(visitors=visitors)

    held = wanted()

    def changed() -> Any:
        nonlocal held
        with lock:
            fresh = wanted()
            if fresh is held:
                return None
            held = fresh
            return fresh

    return grpc.dynamic_ssl_server_credentials(held, changed, require_client_authentication=True)
