"""Signatures over results: body, run, round, kind and client, so that none can be swapped for another.

What is signed is a byte string that no other tuple of fields gives: a domain line, then every field with its
length before it. The body goes in as its length and SHA-256, so a large one is hashed as it streams and never
held twice.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft.credentials.identity import identity_of
from fedpeft.credentials.keys import PrivateKey
from fedpeft.errors import UpdateError

# TLS signs with the same key, over messages that begin with 64 spaces: the two cannot be confused.
_DOMAIN = b"fedpeft update signature v2"


@dataclass(frozen=True)
class UpdateHeader:
    """What an update belongs to.

    Attributes:
        run_id: the server's name for the run; two runs of one run file differ in it.
        run_digest: of what agents are told of the run (`fedpeft.config.device_task`), hexadecimal.
        round: the round that it answers; 0 for the roll call.
        kind: of the task that it answers, such as "train".
        client: the name in the signer's certificate.
    """

    run_id: str
    run_digest: str
    round: int
    kind: str
    client: str


def sign_update(key: PrivateKey, header: UpdateHeader, body: bytes | memoryview) -> bytes:
    """ECDSA (P-256, SHA-256) over header and body; see `sign_body_digest` for a body that streams."""
    return sign_body_digest(key, header, hashlib.sha256(body).digest(), len(body))


def sign_body_digest(key: PrivateKey, header: UpdateHeader, body_sha256: bytes, body_bytes: int) -> bytes:
    """As `sign_update`, from the body's SHA-256 (32 bytes) and its length.

    The nonce is derived from key and message, so that a device with a poor random source does not give its
    key away. Source: RFC 6979.

    Raises:
        UpdateError: the digest is not 32 bytes, or round or length cannot be.
    """
    algorithm = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
    return key.sign(bytes_to_sign(header, body_sha256, body_bytes), algorithm)


def verify_update(
    certificate: x509.Certificate, header: UpdateHeader, body: bytes | memoryview, signature: bytes
) -> None:
    """Refuse an update that the certificate's holder did not sign for this run, round, kind and client.

    Raises:
        UpdateError: another client's certificate, or any field, the body or the signature differs.
    """
    verify_body_digest(certificate, header, hashlib.sha256(body).digest(), len(body), signature)


def verify_body_digest(
    certificate: x509.Certificate,
    header: UpdateHeader,
    body_sha256: bytes,
    body_bytes: int,
    signature: bytes,
) -> None:
    """As `verify_update`, from the body's SHA-256 (32 bytes) and its length.

    Raises:
        UpdateError: as there.
    """
    holder = identity_of(certificate).name
    if holder != header.client:
        raise UpdateError(
            f"an update of {header.client!r} came with the certificate of {holder!r}; a client sends its own"
        )
    key = certificate.public_key()
    message = bytes_to_sign(header, body_sha256, body_bytes)
    try:
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise InvalidSignature
        key.verify(signature, message, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise UpdateError(
            f"{header.client!r}, round {header.round}: the signature does not fit the update, its run, round"
            " and kind; it was changed on its way or made for another; send it again"
        ) from None


def bytes_to_sign(header: UpdateHeader, body_sha256: bytes, body_bytes: int) -> bytes:
    """The byte string under the signature.

    Raises:
        UpdateError: the digest is not 32 bytes, or round or length is not in 0..2^63-1.
    """
    if len(body_sha256) != hashlib.sha256().digest_size:
        raise UpdateError(f"a body digest of {len(body_sha256)} bytes came; SHA-256 has 32")
    for what, number in (("round", header.round), ("body length", body_bytes)):
        if not 0 <= number < 2**63:
            raise UpdateError(f"{what} {number} cannot be signed; it is a whole number from 0 to 2^63-1")
    return length_prefixed(
        (
            _DOMAIN,
            header.run_id.encode(),
            header.run_digest.encode(),
            struct.pack("<Q", header.round),
            header.kind.encode(),
            header.client.encode(),
            struct.pack("<Q", body_bytes),
            body_sha256,
        )
    )


def length_prefixed(fields: Sequence[bytes]) -> bytes:
    """The number of fields, then each field's length and bytes (lengths: 8 bytes, little-endian).

    Two different sequences never give the same bytes: the lengths say where each field ends.
    """
    parts = [struct.pack("<Q", len(fields))]
    for field in fields:
        parts += [struct.pack("<Q", len(field)), field]
    return b"".join(parts)
