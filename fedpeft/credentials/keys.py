"""Private keys: P-256, in files that nobody else may read.

P-256 serves both TLS and the signing of updates: gRPC's TLS refuses Ed25519 certificates of servers and
clients ("no common signature algorithms"), and P-384 and RSA are slower at the same purpose.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedpeft.errors import CredentialError
from fedpeft.runtime.files import storage, write_atomically

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey

_PRIVATE_FILE, _PRIVATE_FOLDER = 0o600, 0o700
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def new_key() -> PrivateKey:
    """A fresh P-256 key from the operating system's random source."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: PrivateKey) -> bytes:
    """PKCS #8, unencrypted: it is secret."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def public_der(key: ec.EllipticCurvePublicKey) -> bytes:
    """SubjectPublicKeyInfo: equal for equal keys."""
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def write_key(path: Path, key: PrivateKey) -> None:
    """Write a key with mode 0600, whole or not at all.

    Raises:
        StorageError: it cannot be written.
    """
    write_atomically(path, key_pem(key), mode=_PRIVATE_FILE)


def read_key(path: Path) -> PrivateKey:
    """Read a key that only its owner may read.

    Raises:
        CredentialError: missing, readable by others, or not a P-256 key.
        StorageError: it cannot be read.
    """
    with storage(path):
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except FileNotFoundError:
            raise CredentialError(
                f"{path}: there is no key; enrol with a token, or copy the provisioned folder"
            ) from None
        if mode & _OTHERS:
            raise CredentialError(
                f"{path}: its mode is {mode:04o}, so others on this machine could use the key; run: chmod 600"
                f" '{path}', and replace the key if they may have read it"
            )
        content = path.read_bytes()
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CredentialError(f"{path}: holds no unencrypted P-256 key in PEM; copy it anew or enrol again")
    return key


def private_folder(path: Path) -> Path:
    """Make a folder of mode 0700, or narrow one that is there.

    Raises:
        StorageError: it cannot be made.
    """
    with storage(path):
        path.mkdir(parents=True, exist_ok=True, mode=_PRIVATE_FOLDER)
        path.chmod(_PRIVATE_FOLDER)
    return path
