"""The folder of a server, agent or admin: its key, its certificate and the authority it trusts."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509

from fedpeft.credentials.certificates import (
    certificate_pem,
    check_dates,
    parse_certificate,
    public_p256,
    read_certificate,
)
from fedpeft.credentials.keys import (
    PrivateKey,
    key_pem,
    new_key,
    private_folder,
    public_der,
    read_key,
    write_key,
)
from fedpeft.errors import CredentialError
from fedpeft.runtime.files import storage, sync_folder, write_atomically

KEY_FILE, CERTIFICATE_FILE, AUTHORITY_FILE, REVOKED_FILE = (
    "key.pem",
    "certificate.pem",
    "ca.pem",
    "revoked.pem",
)
_PENDING_FILE = "next-key.pem"


@dataclass(frozen=True)
class Material:
    """What one end of a connection needs; its `repr` shows no key.

    Attributes:
        certificate: this end's own.
        authority: the certificate of the authority that both ends trust.
    """

    key: PrivateKey = field(repr=False)
    certificate: x509.Certificate
    authority: x509.Certificate

    @property
    def key_pem(self) -> bytes:
        """For gRPC; it is secret."""
        return key_pem(self.key)

    @property
    def certificate_pem(self) -> bytes:
        """For gRPC: the certificate alone, since its issuer is the root that the other end has."""
        return certificate_pem(self.certificate)

    @property
    def authority_pem(self) -> bytes:
        """For gRPC: the root certificate."""
        return certificate_pem(self.authority)


def read_material(folder: Path, now: datetime) -> Material:
    """Key, certificate and authority of a folder, checked against each other.

    Raises:
        CredentialError: a file is missing or foreign, the key is readable by others or another certificate's,
            the certificate is not the authority's or has expired.
        StorageError: a file cannot be read.
    """
    certificate = read_certificate(folder / CERTIFICATE_FILE)
    _finish_adoption(folder, certificate)
    material = Material(read_key(folder / KEY_FILE), certificate, read_certificate(folder / AUTHORITY_FILE))
    check_material(material, str(folder))
    check_dates(certificate, now, f"'{folder}'")
    return material


def check_material(material: Material, where: str) -> None:
    """Refuse a key, certificate and authority that do not belong together.

    Raises:
        CredentialError: naming the two that do not fit.
    """
    if public_der(material.key.public_key()) != public_der(public_p256(material.certificate)):
        raise CredentialError(
            f"{where}: the key is not the certificate's; copy both from one provisioned folder"
        )
    if not is_issued_by(material.certificate, material.authority):
        raise CredentialError(
            f"{where}: the authority in {AUTHORITY_FILE} did not issue the certificate; copy all files"
            " from one provisioned folder"
        )


def write_material(folder: Path, material: Material) -> None:
    """Write a new folder of mode 0700.

    Raises:
        StorageError: it cannot be written.
    """
    private_folder(folder)
    write_key(folder / KEY_FILE, material.key)
    write_atomically(folder / AUTHORITY_FILE, material.authority_pem)
    write_atomically(folder / CERTIFICATE_FILE, material.certificate_pem)


def pending_key(folder: Path) -> PrivateKey:
    """The key to ask a certificate for, on the disk before anybody hears of it.

    A device that is killed while it enrols or renews asks again with the same key, and gets what was meant
    for it; see `adopt`.

    Raises:
        CredentialError: the pending key's file is no key, or readable by others.
        StorageError: it cannot be written.
    """
    private_folder(folder)
    if not (folder / _PENDING_FILE).is_file():
        write_key(folder / _PENDING_FILE, new_key())
    return read_key(folder / _PENDING_FILE)


def adopt(folder: Path, certificate_pem: bytes, authority: x509.Certificate) -> Material:
    """Take the certificate that came for the pending key, in place of the folder's key and certificate.

    A crash leaves the old pair or the new one.

    Raises:
        CredentialError: the certificate is another key's or another authority's.
        StorageError: it cannot be written.
    """
    certificate = parse_certificate(certificate_pem, "the server's answer")
    material = Material(read_key(folder / _PENDING_FILE), certificate, authority)
    check_material(material, "the server's answer")
    write_atomically(folder / AUTHORITY_FILE, material.authority_pem)
    write_atomically(folder / CERTIFICATE_FILE, material.certificate_pem)
    _finish_adoption(folder, certificate)
    return material


def _finish_adoption(folder: Path, certificate: x509.Certificate) -> None:
    """Move the pending key into its place, if the certificate is already its own."""
    pending = folder / _PENDING_FILE
    if not pending.is_file():
        return
    if public_der(read_key(pending).public_key()) == public_der(public_p256(certificate)):
        with storage(pending):
            pending.replace(folder / KEY_FILE)
            sync_folder(folder)


def is_issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the authority's key signed the certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # InvalidSignature, ValueError, TypeError: all say no
        return False
    return True
