"""Certificates as files and PEM: reading, what they are called, when they end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft.errors import CredentialError, ValidityError
from fedpeft.runtime.files import storage

MAX_PEM = 16_384  # bytes; ours are under 1,200
_WARN = timedelta(days=14)


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """PEM of one certificate."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def certificate_der(certificate: x509.Certificate) -> bytes:
    """DER of one certificate."""
    return certificate.public_bytes(serialization.Encoding.DER)


def parse_certificate(pem: bytes, where: str) -> x509.Certificate:
    """One certificate with a P-256 key from PEM.

    Args:
        where: a file or a peer, for errors.

    Raises:
        CredentialError: too large, not a certificate, or of another kind of key.
    """
    return _parse(x509.load_pem_x509_certificate, pem, where)


def parse_der(der: bytes, where: str) -> x509.Certificate:
    """As `parse_certificate`, from DER.

    Raises:
        CredentialError: as there.
    """
    return _parse(x509.load_der_x509_certificate, der, where)


def _parse(load: Callable[[bytes], x509.Certificate], content: bytes, where: str) -> x509.Certificate:
    try:
        if len(content) > MAX_PEM:
            raise ValueError
        certificate = load(content)
        public_p256(certificate)
    except ValueError:
        raise CredentialError(f"{where}: no certificate with a P-256 key; provision or enrol again") from None
    return certificate


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate from its file.

    Raises:
        CredentialError: missing or not one of ours.
        StorageError: it cannot be read.
    """
    with storage(path):
        if not path.is_file():
            raise CredentialError(
                f"{path}: there is no certificate; enrol with a token, or copy the provisioned folder"
            )
        content = path.read_bytes()
    return parse_certificate(content, str(path))


def valid_until(path: Path, now: datetime) -> datetime | None:
    """Return when the certificate of a file ends; None: none is there, it cannot be read, or it has ended.

    Raises:
        StorageError: the file cannot be read.
    """
    try:
        end = read_certificate(path).not_valid_after_utc
    except CredentialError:
        return None
    return end if now <= end else None


def public_p256(certificate: x509.Certificate) -> ec.EllipticCurvePublicKey:
    """The certificate's key.

    Raises:
        ValueError: it is not on P-256.
    """
    try:
        key = certificate.public_key()
    except Exception as error:  # an unknown algorithm raises one of several
        raise ValueError("unknown kind of key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("not a P-256 key")
    return key


def fingerprint(certificate: x509.Certificate) -> bytes:
    """SHA-256 of the certificate's DER, 32 bytes."""
    return hashlib.sha256(certificate_der(certificate)).digest()


def check_dates(
    certificate: x509.Certificate, now: datetime, what: str, *, whose: str = "this machine's"
) -> None:
    """Refuse a certificate that has expired or has not begun.

    Args:
        whose: the clock that says `now`; a server's words are read on another machine.

    Raises:
        ValidityError: with the dates and the remedy.
    """
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > ends:
        raise ValidityError(
            f"the certificate of {what} expired on {ends:%Y-%m-%d %H:%M} UTC, and {whose} clock says"
            f" {now:%Y-%m-%d %H:%M}; set it if it is wrong, else renew or enrol again"
        )
    if now < begins:
        raise ValidityError(
            f"the certificate of {what} begins on {begins:%Y-%m-%d %H:%M} UTC, and {whose} clock says"
            f" {now:%Y-%m-%d %H:%M}; set it"
        )


def expiry_warning(certificate: x509.Certificate, now: datetime, what: str) -> str | None:
    """One line if the certificate ends within 14 days or has ended, else nothing."""
    return ending_soon(certificate.not_valid_after_utc, now, what)


def ending_soon(ends: datetime, now: datetime, what: str) -> str | None:
    """As `expiry_warning`, by the end of a certificate that is elsewhere."""
    left = ends - now
    if left > _WARN:
        return None
    if left <= timedelta(0):
        return f"the certificate of {what} has expired; renew or enrol again"
    return f"the certificate of {what} expires in {left.days} days; renew it"


def renewal_due(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether two thirds of the certificate's life are over: early enough for a device that is often off."""
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return now >= begins + (ends - begins) * 2 / 3
