"""Enrolment tokens: one use, an end, one name and role each.

A token reads ``fpt1.SECRET.FINGERPRINT``: 256 bits from the operating system, and the SHA-256 of the
authority's certificate, so that a device that holds nothing else knows the server that it meets.

At rest there is the secret's SHA-256 only. A password would need a slow, salted hash, because it can be
guessed; 256 random bits cannot, so one fast hash gives nothing away and costs a hostile caller's victim
nothing.

A token is spent on a key: whoever comes again with the same key (a device that was killed before the answer
reached it) is granted the same name, and every other key is refused.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import secrets
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from fedpeft.credentials.identity import Identity, Role, check_name
from fedpeft.credentials.keys import private_folder
from fedpeft.errors import CredentialError
from fedpeft.runtime.files import storage, sync_folder, write_atomically

_MARK = "fpt1"
_BYTES = 32
_MAX_LIFE = timedelta(days=30)
_GRACE = timedelta(days=7)
_TICK_NS = 1_000_000_000
_INVITED, _SPENT = ".token", ".spent"


@dataclass(frozen=True)
class Grant:
    """A token as it lies on the disk: what it allows, never the secret.

    Attributes:
        digest: SHA-256 of the secret, hexadecimal.
        expires: the token is worth nothing from then on.
    """

    identity: Identity
    digest: str
    expires: datetime

    @property
    def file_name(self) -> str:
        """A part of the digest: enough to find the file, compared whole afterwards."""
        return self.digest[:16] + _INVITED


class Tokens:
    """The tokens of one authority, a file each; several processes may use the folder at once."""

    def __init__(self, folder: Path, authority_fingerprint: bytes) -> None:
        self._folder = folder
        self._fingerprint = authority_fingerprint
        self._seen: tuple[int, datetime] | None = (
            None  # a cache: the folder's time, and the end of its last token
        )

    def invite(self, identity: Identity, now: datetime, life: timedelta) -> str:
        """A new token's text. It is shown once: what is kept cannot give it back.

        Args:
            life: how long it can be used, at most 30 days.

        Raises:
            CredentialError: a name or a life that cannot be.
            StorageError: its record cannot be written.
        """
        check_name(identity.name)
        if not timedelta(0) < life <= _MAX_LIFE:
            raise CredentialError(
                f"a token's life of {life} cannot be; give more than nothing, at most 30 days"
            )
        self.forget_expired(now)
        secret = secrets.token_bytes(_BYTES)
        grant = Grant(identity, hashlib.sha256(secret).hexdigest(), now + life)
        write_atomically(private_folder(self._folder) / grant.file_name, _encode(grant), mode=0o600)
        return ".".join((_MARK, _text(secret), _text(self._fingerprint)))

    def open_at(self, now: datetime) -> bool:
        """Whether anybody without a certificate needs an answer.

        That is whoever holds a token, also one that it has used (it may have been killed before the
        certificate came) or that ended in the last seven days (it shall read why it is refused). Asked at
        every handshake, so the folder is read only when it has changed.
        """
        with storage(self._folder):
            changed = self._folder.stat().st_mtime_ns if self._folder.is_dir() else 0
        seen = self._seen
        if seen is None or seen[0] != changed:
            ends = (grant.expires + _GRACE for grant in self._grants())
            seen = changed, max(ends, default=datetime.min.replace(tzinfo=UTC))
            # A change within the file system's clock tick would not show: what is so young is read again.
            self._seen = seen if time.time_ns() - changed > _TICK_NS else None
        return seen[1] > now

    def outstanding(self, now: datetime) -> tuple[Grant, ...]:
        """Tokens that nobody has used yet and that have not expired, by name."""
        unused = (
            grant for grant in self._grants() if grant.expires > now and self._device_of_spent(grant) is None
        )
        return tuple(sorted(unused, key=lambda grant: grant.identity.name))

    def redeem(self, text: str, public_key: bytes, now: datetime) -> Identity:
        """Spend a token on a key, on the disk before this returns.

        Args:
            public_key: DER of the key that the certificate will be for.

        Raises:
            CredentialError: unknown, expired, or spent on another key; the message holds no part of it.
            StorageError: the record cannot be written; the token is then not spent.
        """
        grant = self._find(text)
        if grant.expires <= now:
            raise CredentialError("the enrolment token has expired; ask the federation's admin for a new one")
        digest = hashlib.sha256(public_key).hexdigest()
        if not hmac.compare_digest(self._claim(grant, digest), digest):
            raise CredentialError(
                "the enrolment token was used before, by another device; ask the federation's admin for a new"
                " one, and say so: if that was not you, the token was stolen"
            )
        return grant.identity

    def withdraw(self, name: str) -> int:
        """Delete every token for `name`; how many there were.

        Raises:
            StorageError: a record cannot be deleted.
        """
        gone = [grant for grant in self._grants() if grant.identity.name == name]
        with storage(self._folder):
            for grant in gone:
                (self._folder / grant.file_name).unlink(missing_ok=True)
                self._file_of_spent(grant).unlink(missing_ok=True)
        return len(gone)

    def forget_expired(self, now: datetime) -> int:
        """Delete the records of tokens that ended seven days ago, used or not; how many there were.

        Raises:
            StorageError: a record cannot be deleted.
        """
        gone = [grant for grant in self._grants() if grant.expires + _GRACE <= now]
        with storage(self._folder):
            for grant in gone:
                (self._folder / grant.file_name).unlink(missing_ok=True)
                self._file_of_spent(grant).unlink(missing_ok=True)
        return len(gone)

    def _find(self, text: str) -> Grant:
        secret, fingerprint = _parts(text)
        if not hmac.compare_digest(fingerprint, self._fingerprint):
            raise CredentialError(
                "the enrolment token is of another federation; give one of this, or the other's address"
            )
        digest = hashlib.sha256(secret).hexdigest()
        path = self._folder / (digest[:16] + _INVITED)
        # Which file exists tells a guesser about hashes of 256 random bits: nothing that helps.
        grant = _decode(path) if path.is_file() else None
        if grant is None or not hmac.compare_digest(grant.digest, digest):
            raise CredentialError(
                "the enrolment token is not known here; ask the federation's admin for a new one"
            )
        return grant

    def _claim(self, grant: Grant, digest: str) -> str:
        """Whose token it is from now on: linking a whole file to a name is one atomic step, won once."""
        with storage(self._folder):
            handle, temporary = tempfile.mkstemp(prefix=".partial-", dir=self._folder)
            try:
                with os.fdopen(handle, "w", encoding="ascii") as file:
                    file.write(digest)
                    file.flush()
                    os.fsync(file.fileno())
                os.link(temporary, self._file_of_spent(grant))
                sync_folder(self._folder)
            except FileExistsError:
                pass
            finally:
                Path(temporary).unlink(missing_ok=True)
        return self._device_of_spent(grant) or digest

    def _device_of_spent(self, grant: Grant) -> str | None:
        path = self._file_of_spent(grant)
        with storage(path):
            return path.read_text(encoding="ascii") if path.is_file() else None

    def _file_of_spent(self, grant: Grant) -> Path:
        return self._folder / (grant.digest[:16] + _SPENT)

    def _grants(self) -> list[Grant]:
        with storage(self._folder):
            paths = sorted(self._folder.glob(f"*{_INVITED}")) if self._folder.is_dir() else []
        return [_decode(path) for path in paths]


def token_fingerprint(text: str) -> bytes:
    """SHA-256 of the certificate of the authority that a token is of, 32 bytes.

    Raises:
        CredentialError: not a token.
    """
    return _parts(text)[1]


def _parts(text: str) -> tuple[bytes, bytes]:
    pieces = text.strip().split(".") if len(text) < 256 else []
    if len(pieces) == 3 and pieces[0] == _MARK:
        secret, fingerprint = (_strip_padding(piece) for piece in pieces[1:])
        if len(secret) == len(fingerprint) == _BYTES:
            return secret, fingerprint
    raise CredentialError(
        f"no enrolment token came; one reads {_MARK}.<43 characters>.<43 characters>, copy it whole"
    )


def _text(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode().rstrip("=")


def _strip_padding(text: str) -> bytes:
    try:
        content = base64.b64decode(text + "=", altchars=b"-_", validate=True)
    except ValueError:
        return b""
    return content if _text(content) == text else b""  # one text per token


def _encode(grant: Grant) -> bytes:
    record = {
        "name": grant.identity.name,
        "role": str(grant.identity.role),
        "secret_sha256": grant.digest,
        "expires": grant.expires.isoformat(),
    }
    return (json.dumps(record, sort_keys=True) + "\n").encode()


def _decode(path: Path) -> Grant:
    with storage(path):
        text = path.read_text(encoding="utf-8")
    try:
        record: dict[str, Any] = json.loads(text)
        identity = Identity(check_name(record["name"]), Role(record["role"]))
        return Grant(identity, str(record["secret_sha256"]), datetime.fromisoformat(record["expires"]))
    except (ValueError, KeyError, TypeError):
        raise CredentialError(
            f"{path}: not a token's record; delete it and invite the device again"
        ) from None
