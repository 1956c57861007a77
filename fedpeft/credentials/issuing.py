"""The certificates that an authority signs: its own, a server's, a device's."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from fedpeft.credentials.enrolment import carry_authority
from fedpeft.credentials.identity import Identity
from fedpeft.credentials.keys import PrivateKey
from fedpeft.errors import CredentialError

AUTHORITY_LIFE = timedelta(days=3650)
LIFE = timedelta(days=365)  # of servers and devices, which renew after two thirds of it
_SKEW = timedelta(days=1)  # certificates begin a day early, for clocks that are slow
_HOST = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)


def authority_certificate(key: PrivateKey, now: datetime) -> x509.Certificate:
    """A new authority, signed by itself. It may sign certificates and lists, and no authority below it."""
    name = _name("fedpeft authority")
    return (
        _builder(name, name, key.public_key(), now, AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def server_certificate(
    authority: x509.Certificate,
    authority_key: PrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    hosts: Sequence[str],
    now: datetime,
    life: timedelta,
) -> x509.Certificate:
    """A server's certificate for host names and IP addresses; it states no role, so it can call nobody.

    Raises:
        CredentialError: no host, or one that is neither a host name nor an IP address.
    """
    names = host_names(hosts)
    return (
        _leaf(authority, _name("fedpeft server"), public_key, now, life, ExtendedKeyUsageOID.SERVER_AUTH)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(carry_authority(authority), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def device_certificate(
    authority: x509.Certificate,
    authority_key: PrivateKey,
    public_key: ec.EllipticCurvePublicKey,
    identity: Identity,
    now: datetime,
    life: timedelta,
) -> x509.Certificate:
    """A certificate that calls a server by one name in one role; no host name is in it, so it can't serve."""
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)])
    return (
        _leaf(authority, _name(identity.name), public_key, now, life, ExtendedKeyUsageOID.CLIENT_AUTH)
        .add_extension(names, critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def host_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Hosts as certificates name them.

    Raises:
        CredentialError: no host, or one that is neither a host name nor an IP address.
    """
    if not hosts:
        raise CredentialError("a server needs a host name or IP address that agents dial; give --host NAME")
    return [general_name(host) for host in hosts]


def general_name(host: str) -> x509.GeneralName:
    """A host as certificates name it.

    Raises:
        CredentialError: neither a host name (ASCII; no wildcard, no port) nor an IP address.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not _HOST.fullmatch(host):
        raise CredentialError(
            f"host {host[:80]!r} is neither a host name nor an IP address; give it without scheme and port"
        )
    return x509.DNSName(host.lower())


def server_hosts(certificate: x509.Certificate) -> list[str]:
    """The host names and IP addresses of a server's certificate, as they were given."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return [*names.get_values_for_type(x509.DNSName), *addresses]


def _leaf(
    authority: x509.Certificate,
    subject: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime,
    life: timedelta,
    usage: ObjectIdentifier,
) -> x509.CertificateBuilder:
    authority_id = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        _builder(subject, authority.subject, public_key, now, life)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority_id), critical=False
        )
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime,
    life: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + life)
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
