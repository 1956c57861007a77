"""The authority of a federation: a folder with its key, what it issued, whom it invited and whom it revoked.

A name is one device. Enrolling a name again with another key revokes the device that had it; a certificate
has at most one successor, so that of a device and a thief who both renew, one is refused and the theft shows.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft.credentials.certificates import (
    certificate_pem,
    check_dates,
    fingerprint,
    parse_certificate,
    public_p256,
    read_certificate,
)
from fedpeft.credentials.identity import Identity, check_name, identity_of
from fedpeft.credentials.issuing import LIFE, authority_certificate, device_certificate, server_certificate
from fedpeft.credentials.keys import PrivateKey, new_key, private_folder, public_der, read_key, write_key
from fedpeft.credentials.material import (
    AUTHORITY_FILE,
    KEY_FILE,
    REVOKED_FILE,
    Material,
    check_material,
    is_issued_by,
)
from fedpeft.credentials.requests import read_requested_key
from fedpeft.credentials.revocation import read_revocations, revocations_pem
from fedpeft.credentials.tokens import Tokens
from fedpeft.errors import CredentialError
from fedpeft.runtime.files import storage, write_atomically

_ISSUED, _TOKENS, _LOCK = "issued", "tokens", ".lock"


@dataclass(frozen=True)
class Authority:
    """An authority's folder, open. Writers take the folder's lock: processes can share it."""

    folder: Path
    certificate: x509.Certificate
    key: PrivateKey = field(repr=False)

    @property
    def revoked_file(self) -> Path:
        """The signed revocation list, for `PeerCheck`."""
        return self.folder / REVOKED_FILE

    @cached_property
    def tokens(self) -> Tokens:
        """The federation's enrolment tokens."""
        return Tokens(self.folder / _TOKENS, fingerprint(self.certificate))

    def server(
        self,
        public_key: ec.EllipticCurvePublicKey,
        hosts: Sequence[str],
        now: datetime,
        life: timedelta = LIFE,
    ) -> bytes:
        """A server's certificate, PEM.

        Raises:
            CredentialError: no usable host.
        """
        issued = server_certificate(self.certificate, self.key, public_key, hosts, now, life)
        return certificate_pem(issued)

    def device(
        self,
        public_key: ec.EllipticCurvePublicKey,
        identity: Identity,
        now: datetime,
        life: timedelta = LIFE,
    ) -> bytes:
        """A device's certificate, PEM; the same again for the same name, role and key.

        Whoever had the name with another key is revoked.

        Raises:
            CredentialError: the name cannot be used.
            StorageError: the record of it cannot be written; nothing is issued then.
        """
        check_name(identity.name)
        with self._lock():
            earlier = self._live(identity.name, now)
            same = [item for item in earlier if _same_key(item, public_key) and identity_of(item) == identity]
            issued = same[-1] if same else self._issue(public_key, identity, now, life)
            # A crash may have come between the two, so the second is done again when a device comes again.
            self._revoke(earlier[: earlier.index(issued)] if same else earlier, now)
            return certificate_pem(issued)

    def enrol(self, token: str, request_pem: bytes, now: datetime, life: timedelta = LIFE) -> bytes:
        """A certificate, PEM, for the key of a request, in the name and role of a token, which is then spent.

        Coming again with token and key gives the certificate again.

        Raises:
            CredentialError: the request is none, or the token is unknown, expired or spent on another key.
            StorageError: the token or the certificate cannot be recorded.
        """
        key = read_requested_key(request_pem)
        identity = self.tokens.redeem(token, public_der(key), now)
        return self.device(key, identity, now, life)

    def renew(self, peer_pem: bytes, request_pem: bytes, now: datetime, life: timedelta = LIFE) -> bytes:
        """A successor, PEM, with the name and role of the certificate that the caller holds now.

        Args:
            peer_pem: what the caller proved to hold in the TLS handshake.

        Raises:
            CredentialError: that certificate is foreign, expired, revoked, in the first half of its life, or
                has a successor with another key; or the request is none.
            StorageError: the record of it cannot be written.
        """
        key = read_requested_key(request_pem)
        old = parse_certificate(peer_pem, "the caller's certificate")
        if not is_issued_by(old, self.certificate):
            raise CredentialError("the caller's certificate is not of this federation; enrol with a token")
        identity = identity_of(old)
        check_dates(old, now, f"{identity.name!r}", whose="the server's")
        with self._lock():
            live = self._live(identity.name, now)
            if old not in live:
                raise CredentialError(
                    f"the certificate of {identity.name!r} was revoked; ask for a new token"
                )
            successors = live[live.index(old) + 1 :]
            for successor in successors:
                if _same_key(successor, key):
                    return certificate_pem(successor)
            self._check_renewable(old, identity, successors, now)
            return certificate_pem(self._issue(key, identity, now, life))

    def revoke(self, name: str, now: datetime) -> int:
        """Revoke every certificate of a name and withdraw its tokens; how many of both there were.

        Raises:
            CredentialError: nobody of that name has a certificate or a token.
            StorageError: the list cannot be written; the certificates are then not revoked.
        """
        with self._lock():
            live = self._live(name, now)
            self._revoke(live, now)
            count = len(live) + self.tokens.withdraw(name)
        if not count:
            raise self.refuse_unknown(name, now)
        return count

    def refuse_unknown(self, name: str, now: datetime) -> CredentialError:
        """The error that nobody of this name can be revoked, with the names that can."""
        known = ", ".join(sorted({identity_of(item).name for item in self.list_issued(now)})) or "nobody"
        return CredentialError(f"{name[:80]!r} has no certificate and no token; revocable: {known}")

    def holds(self, name: str, now: datetime) -> tuple[x509.Certificate, ...]:
        """The certificates of a name that are neither expired nor revoked, in the order of issue."""
        return tuple(self._live(check_name(name), now))

    def list_revoked(self, now: datetime) -> frozenset[str]:
        """Names that hold nothing any more because their certificates were revoked before they ended."""
        listed = read_revocations(self.revoked_file, self.certificate)
        live, gone = set[str](), set[str]()
        for path in self._records("*"):
            item = read_certificate(path)
            if item.not_valid_after_utc >= now:
                (gone if item in listed else live).add(identity_of(item).name)
        return frozenset(gone - live)

    def list_issued(self, now: datetime) -> tuple[x509.Certificate, ...]:
        """Device certificates that are neither expired nor revoked, by name."""
        names = sorted({path.name.rpartition(".")[0].rpartition(".")[0] for path in self._records("*")})
        return tuple(item for name in names for item in self._live(name, now))

    def _check_renewable(
        self, old: x509.Certificate, identity: Identity, successors: Sequence[x509.Certificate], now: datetime
    ) -> None:
        if successors:
            raise CredentialError(
                f"the certificate of {identity.name!r} was renewed before, with another key; if that was not"
                " this device, its key was stolen: ask the admin to revoke it and for a new token"
            )
        begins, ends = old.not_valid_before_utc, old.not_valid_after_utc
        half = begins + (ends - begins) / 2
        if now < half:
            raise CredentialError(
                f"the certificate of {identity.name!r} can be renewed from {half:%Y-%m-%d} on"
            )

    def _issue(
        self, public_key: ec.EllipticCurvePublicKey, identity: Identity, now: datetime, life: timedelta
    ) -> x509.Certificate:
        """A certificate, on record before anybody holds it: what is not on record could not be revoked."""
        issued = device_certificate(self.certificate, self.key, public_key, identity, now, life)
        folder = private_folder(self.folder / _ISSUED)
        write_atomically(folder / f"{identity.name}.{issued.serial_number:040x}.pem", certificate_pem(issued))
        return issued

    def _live(self, name: str, now: datetime) -> list[x509.Certificate]:
        """Certificates of a name that still count, in the order of issue."""
        revoked = read_revocations(self.revoked_file, self.certificate)
        found = [read_certificate(path) for path in self._records(name)]
        live = [item for item in found if item not in revoked and item.not_valid_after_utc >= now]
        return sorted(live, key=lambda item: (item.not_valid_before_utc, item.not_valid_after_utc))

    def _records(self, name: str) -> list[Path]:
        folder = self.folder / _ISSUED
        with storage(folder):
            return sorted(folder.glob(f"{name}.{'[0-9a-f]' * 40}.pem"))

    def _revoke(self, certificates: Sequence[x509.Certificate], now: datetime) -> None:
        """Add to the list and sign it anew; certificates that ended by themselves leave it."""
        if not certificates:
            return
        old = read_revocations(self.revoked_file, self.certificate)
        serials = {**old.serials, **{item.serial_number: now for item in certificates}}
        for path in self._records("*"):
            item = read_certificate(path)
            if item.not_valid_after_utc < now - timedelta(days=1):
                serials.pop(item.serial_number, None)
        pem = revocations_pem(self.certificate, self.key, serials, old.number + 1, now)
        write_atomically(self.revoked_file, pem)

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with storage(self.folder):
            handle = os.open(self.folder / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX)
                yield
            finally:
                os.close(handle)


def create_authority(folder: Path, now: datetime) -> Authority:
    """Make a new authority in a folder.

    Raises:
        CredentialError: there is one already: replacing it would lock out everybody that it enrolled.
        StorageError: it cannot be written.
    """
    if (folder / KEY_FILE).exists() or (folder / AUTHORITY_FILE).exists():
        raise CredentialError(f"'{folder}' holds an authority already; give another folder")
    private_folder(folder)
    key = new_key()
    certificate = authority_certificate(key, now)
    write_key(folder / KEY_FILE, key)
    write_atomically(folder / REVOKED_FILE, revocations_pem(certificate, key, {}, 1, now))
    write_atomically(folder / AUTHORITY_FILE, certificate_pem(certificate))
    return Authority(folder, certificate, key)


def open_authority(folder: Path) -> Authority:
    """The authority of a folder.

    Raises:
        CredentialError: a file is missing or foreign, or the key is readable by others.
        StorageError: a file cannot be read.
    """
    certificate = read_certificate(folder / AUTHORITY_FILE)
    key = read_key(folder / KEY_FILE)
    check_material(Material(key, certificate, certificate), str(folder))
    read_revocations(folder / REVOKED_FILE, certificate)
    return Authority(folder, certificate, key)


def _same_key(certificate: x509.Certificate, key: ec.EllipticCurvePublicKey) -> bool:
    return public_der(public_p256(certificate)) == public_der(key)
