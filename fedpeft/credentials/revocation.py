"""Certificates that are no longer worth anything: a list that the authority signs (an X.509 CRL)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from fedpeft.credentials.certificates import public_p256
from fedpeft.credentials.keys import PrivateKey
from fedpeft.errors import CredentialError
from fedpeft.runtime.files import storage

_FRESH_FOR = timedelta(days=365)


@dataclass(frozen=True)
class Revocations:
    """Revoked certificates by serial number, with the time of it.

    Attributes:
        number: counts up with every list; a lower one is an older list.
    """

    serials: Mapping[int, datetime]
    number: int

    def __contains__(self, certificate: x509.Certificate) -> bool:
        return certificate.serial_number in self.serials


def read_revocations(path: Path, authority: x509.Certificate) -> Revocations:
    """A list from its file.

    Raises:
        CredentialError: missing, unreadable or not signed by the authority: without it, nobody can be let in.
        StorageError: it cannot be read.
    """
    with storage(path):
        if not path.is_file():
            raise CredentialError(
                f"{path}: the revocation list is missing; copy it from the authority's folder"
            )
        content = path.read_bytes()
    try:
        listed = x509.load_pem_x509_crl(content)
        if not listed.is_signature_valid(public_p256(authority)):
            raise ValueError
        number = listed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        serials = {item.serial_number: item.revocation_date_utc for item in listed}
    except (ValueError, TypeError, x509.ExtensionNotFound):
        raise CredentialError(
            f"{path}: no revocation list of this authority; copy it from the authority's folder"
        ) from None
    return Revocations(serials, number)


def revocations_pem(
    authority: x509.Certificate, key: PrivateKey, revoked: Mapping[int, datetime], number: int, now: datetime
) -> bytes:
    """A signed list in PEM."""
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(authority.subject)
        .last_update(now)
        .next_update(now + _FRESH_FOR)
        .add_extension(x509.CRLNumber(number), critical=False)
    )
    for entry in _entries(revoked):
        builder = builder.add_revoked_certificate(entry)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _entries(revoked: Mapping[int, datetime]) -> Iterable[x509.RevokedCertificate]:
    for serial, when in sorted(revoked.items()):
        yield x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(when).build()
