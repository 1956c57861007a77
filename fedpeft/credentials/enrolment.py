"""The first contact: a device with a token and no certificate, and a port that asks for certificates.

gRPC for Python can demand client certificates or not ask for them, per port; there is no "if you have one".
So that one port serves both, a device without a certificate comes as a *visitor*: it signs a certificate for
itself with a key that anyone can compute from the authority's certificate. That proves nothing and says no
name and no role, and `PeerCheck` refuses it; the one call that does not ask `PeerCheck` is the one that takes
a token. The server trusts visitors' certificates only while there are tokens.

The device knows the server before it sends the token: the token carries the fingerprint of the authority, and
the server's certificate carries the authority's certificate in an extension, because Python's `ssl` hands out
a server's own certificate and no others.
"""

from __future__ import annotations

import hashlib
import hmac
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpeft.credentials.certificates import (
    certificate_der,
    certificate_pem,
    fingerprint,
    parse_certificate,
    parse_der,
)
from fedpeft.credentials.keys import PrivateKey, new_key
from fedpeft.credentials.material import Material, is_issued_by
from fedpeft.credentials.tokens import token_fingerprint
from fedpeft.errors import CredentialError

# Under the arc that any UUID may use (ITU-T X.667): 2.25, then the UUID as a number.
CARRIED_AUTHORITY = x509.ObjectIdentifier("2.25.173562835862003046129016717196633519524")
_VISITORS = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedpeft visitors")])
_VISITOR = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedpeft visitor")])
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256's group; FIPS 186-4


def carry_authority(authority: x509.Certificate) -> x509.UnrecognizedExtension:
    """The extension of a server's certificate that carries its authority's."""
    return x509.UnrecognizedExtension(CARRIED_AUTHORITY, certificate_der(authority))


def pin_authority(token: str, server_pem: bytes) -> x509.Certificate:
    """The authority to trust from now on: carried by the server's certificate, known by the token.

    Args:
        server_pem: what the server showed, from a connection that trusted nothing yet
            (`ssl.get_server_certificate`). Nothing may be sent on that connection.

    Raises:
        CredentialError: the server is not the one that the token is of.
    """
    wanted = token_fingerprint(token)
    server = parse_certificate(server_pem, "the server's certificate")
    try:
        carried = server.extensions.get_extension_for_oid(CARRIED_AUTHORITY).value
        content = carried.value if isinstance(carried, x509.UnrecognizedExtension) else b""
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        content = b""
    authority = parse_der(content, "the server's certificate") if content else None
    if authority is None or not hmac.compare_digest(fingerprint(authority), wanted):
        raise CredentialError(
            "the server is not the one that the token is of; check the address, and if it is right, someone"
            " stands between: do not go on"
        )
    if not is_issued_by(server, authority):
        raise CredentialError("the server shows a certificate that its authority did not issue; do not go on")
    return authority


def visitor_material(authority: x509.Certificate) -> Material:
    """What a device without a certificate dials with. It is worth nothing but the chance to show a token.

    It is valid for as long as the authority is, so that no clock but the server's has to be right for it.
    """
    key = new_key()
    begins, ends = authority.not_valid_before_utc, authority.not_valid_after_utc
    builder = _build(_VISITOR, key.public_key(), begins, ends).add_extension(
        x509.BasicConstraints(ca=False, path_length=None), critical=True
    )
    certificate = builder.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
    ).sign(_visitors_key(authority), hashes.SHA256())
    return Material(key, certificate, authority)


def client_roots(authority: x509.Certificate, *, visitors: bool) -> bytes:
    """The roots of the client certificates that a server accepts, PEM: its authority, and visitors' or not.

    Make each once and keep it: no two calls give the same bytes.
    """
    if not visitors:
        return certificate_pem(authority)
    key = _visitors_key(authority)
    begins, ends = authority.not_valid_before_utc, authority.not_valid_after_utc
    root = (
        _build(_VISITORS, key.public_key(), begins, ends)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate_pem(authority) + certificate_pem(root)


def _visitors_key(authority: x509.Certificate) -> PrivateKey:
    """A key that is no secret: everybody who sees the authority's certificate can compute it."""
    digest = hashlib.sha512(b"fedpeft visitors key v1" + fingerprint(authority)).digest()
    return ec.derive_private_key(int.from_bytes(digest, "big") % (_ORDER - 1) + 1, ec.SECP256R1())


def _build(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, begins: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(_VISITORS)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
    )
