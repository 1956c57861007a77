"""Who calls: from the certificate that a TLS handshake accepted to a name and a role, or a refusal.

The handshake proves that the caller holds the key of a certificate under one of the server's roots. What it
does not say is checked here, at every call and as often as a long stream wants: that the authority itself
issued it (visitors are told apart, see `enrolment`), that it has not ended since, and that it is not revoked.
gRPC for Python knows no revocation lists, so a revoked device gets as far as its first call, and no further.
"""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

from cryptography import x509

from fedpeft.credentials.certificates import check_dates, fingerprint, parse_certificate
from fedpeft.credentials.identity import Identity, identity_of
from fedpeft.credentials.material import is_issued_by
from fedpeft.credentials.revocation import Revocations, read_revocations
from fedpeft.errors import CredentialError
from fedpeft.runtime.files import storage

_REMEMBERED = 4_096  # certificates whose signature was checked; a verification costs a tenth of a millisecond


class PeerCheck:
    """Checks callers' certificates against one authority and its revocation list.

    The list is read again when its file changes, so that a revocation needs no restart; a list that has
    become older or unreadable is refused, and with it every caller.
    """

    def __init__(self, authority: x509.Certificate, revoked_file: Path) -> None:
        self._authority = authority
        self._file = revoked_file
        self._stamp: tuple[int, ...] = ()
        self._revoked = Revocations({}, 0)
        self._known: dict[bytes, x509.Certificate] = {}  # a cache, emptied when full
        self.refresh()

    def identity(self, pem: bytes, now: datetime) -> Identity:
        """Who the holder of the certificate is.

        Args:
            pem: `x509_pem_cert` of gRPC's `auth_context`.

        Raises:
            CredentialError: not of this authority, expired, revoked, or without name and role.
            StorageError: the revocation list cannot be read.
        """
        return identity_of(self.certificate(pem, now))

    def certificate(self, pem: bytes, now: datetime) -> x509.Certificate:
        """The certificate itself, checked as `identity` does: for `verify_update`.

        Raises:
            CredentialError, StorageError: as there.
        """
        certificate = self._check_issued(pem)
        who = f"{identity_of(certificate).name!r}"
        check_dates(certificate, now, who, whose="the server's")
        self.refresh()
        if certificate in self._revoked:
            raise CredentialError(
                f"the certificate of {who} was revoked; ask the federation's admin for a new token"
            )
        return certificate

    def refresh(self) -> bool:
        """Read the revocation list again if its file has changed; whether it had.

        Raises:
            CredentialError: missing, foreign, or older than the one that was in force.
            StorageError: it cannot be read.
        """
        with storage(self._file):
            try:
                status = os.stat(self._file)
            except FileNotFoundError:
                status = None
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size) if status else ()
        if stamp and stamp == self._stamp:
            return False
        fresh = read_revocations(self._file, self._authority)
        if fresh.number < self._revoked.number:
            raise CredentialError(
                f"{self._file}: list {fresh.number} is older than list {self._revoked.number}, which was in"
                " force; copy the authority's latest"
            )
        self._revoked, self._stamp = fresh, stamp
        return True

    def _check_issued(self, pem: bytes) -> x509.Certificate:
        known = self._known.get(pem)
        if known is not None:
            return known
        certificate = parse_certificate(pem, "the caller's certificate")
        if not is_issued_by(certificate, self._authority):
            raise CredentialError(
                "the caller's certificate is not of this federation; enrol with a token of its admin"
            )
        if fingerprint(certificate) == fingerprint(self._authority):
            raise CredentialError("the caller came as the authority itself; use a device's certificate")
        if len(self._known) >= _REMEMBERED:
            self._known.clear()
        self._known[bytes(pem)] = certificate
        return certificate
