"""Who did what on this server: rows that are only ever added, each with the digest of the one before it.

A digest covers its row and, through the digest before, all earlier ones. So a row that is changed, taken out
or moved is found by reading the table alone. Rows that are cut off at the end, and a table that was written
anew as a whole, are sound in themselves: these are found by a number and digest that was noted elsewhere. The
newest one is in a file of the state folder (`HEAD`), in the daemon's log, in each backup, and in what
`fedpeft server audit` prints; whoever reaches all of them can hide what was done, and nobody else.

A row is durable before what it tells of is done, or in the same transaction. A crash between the two leaves a
row about something that did not happen, never something that happened without a row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from sqlalchemy import Connection, Row, select

from fedpeft.errors import StateError, StorageError, UsageError
from fedpeft.runtime.files import storage, write_atomically
from fedpeft_server.store.database import Database
from fedpeft_server.store.schema import audit

LOG = logging.getLogger("fedpeft.server")
HEAD = "audit.head"
_NOTHING = "0" * 64  # stands for the digest before the first row
_AT_A_TIME = 1000  # rows that are read


class Action(StrEnum):
    """What is recorded."""

    BEGAN = "began"  # the log itself
    CUT = "cut"  # rows that were there before are missing, or are others
    RESTORED = "restored"  # the state is that of a backup
    SUBMITTED = "submitted"
    STOPPED = "stopped"
    REMOVED = "removed"  # a run's files
    PULLED = "pulled"
    INVITED = "invited"
    ENROLLED = "enrolled"
    RENEWED = "renewed"
    REVOKED = "revoked"
    ISSUED = "issued"  # a folder with key and certificate, beside the server
    CREATED = "created"  # the federation, beside the server
    READ = "read"  # somebody else's run, or a list with such in it
    REFUSED = "refused"  # what the caller's role or name does not allow


@dataclass(frozen=True)
class Actor:
    """Who does it: a certificate's name and role, or the server itself."""

    name: str
    role: str


SERVER = Actor("server", "server")  # no certificate has that role


@dataclass(frozen=True)
class Head:
    """A row's number and digest: what stands for it and all rows before."""

    number: int
    digest: str

    def __str__(self) -> str:
        return f"{self.number}:{self.digest}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read a head as it is printed.

        Raises:
            UsageError: it is none.
        """
        number, _, digest = text.strip().partition(":")
        if not number.isdecimal() or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise UsageError(f"{text.strip()[:80]!r} names no row of an audit log; give NUMBER:DIGEST")
        return cls(int(number), digest)


@dataclass(frozen=True)
class AuditEntry:
    """One row.

    Attributes:
        at_ms: milliseconds since 1970, UTC.
        subject: a run's id or a member's name.
        detail: JSON of what else is to be known, in ASCII.
        digest: SHA-256, hex.
    """

    number: int
    at_ms: int
    actor: str
    role: str
    action: str
    subject: str
    detail: str
    digest: str

    @property
    def head(self) -> Head:
        """What stands for this row and all before."""
        return Head(self.number, self.digest)

    def digest_after(self, previous: str) -> str:
        """Return the digest that this row has after one with the digest `previous`."""
        fields = [self.number, self.at_ms, self.actor, self.role, self.action, self.subject, self.detail]
        return hashlib.sha256(json.dumps([previous, *fields]).encode()).hexdigest()


class AuditLog:
    """The log of one server.

    Args:
        folder: of the state, where the newest row's number and digest are kept beside the database.

    Raises:
        StorageError: from every method, when the database cannot be used.
    """

    def __init__(self, database: Database, folder: Path) -> None:
        self._database, self._file = database, folder / HEAD
        self._lock = threading.Lock()
        self._written = 0  # number in the file

    def begin(self) -> None:
        """Begin the log, or compare its end with the file's; what is missing is itself recorded."""
        with self._database.reading() as connection:
            last, kept = _last(connection), read_head(self._file)
            held = kept is None or _holds(connection, kept)
        if not held:
            LOG.error(
                "the audit log no longer holds entry %s, it ends at %s; see docs/operations.md",
                kept,
                last.number if last is not None else "nothing",
            )
            self.record(SERVER, Action.CUT, "", expected=str(kept), found=last.number if last else 0)
        elif last is None:
            self.record(SERVER, Action.BEGAN, "")
        else:
            self.publish(last)

    def add(
        self, connection: Connection, who: Actor, action: Action, subject: str, **detail: str | int | float
    ) -> AuditEntry:
        """Add a row in the caller's transaction, which must be one that writes; see `publish`."""
        last = _last(connection)
        fields = AuditEntry(
            number=1 if last is None else last.number + 1,
            at_ms=round(1000 * time.time()),
            actor=who.name,
            role=who.role,
            action=action.value,
            subject=subject,
            detail=json.dumps(detail, sort_keys=True),
            digest="",
        )
        digest = fields.digest_after(_NOTHING if last is None else last.digest)
        entry = AuditEntry(**(vars(fields) | {"digest": digest}))
        connection.execute(audit.insert().values(vars(entry)))
        return entry

    def publish(self, entry: AuditEntry) -> None:
        """Note a row that is durable in the other places; a place that cannot be written is said, no more."""
        facts = {"event": "audit", "number": entry.number, "digest": entry.digest, "actor": entry.actor}
        LOG.info(
            "audit %s: %s (%s) %s %s", entry.head, entry.actor, entry.role, entry.action, entry.subject,
            extra=facts,
        )  # fmt: skip
        with self._lock:
            if entry.number <= self._written:
                return  # another thread was ahead
            try:
                write_atomically(self._file, f"{entry.head}\n".encode(), mode=0o600)
                self._written = entry.number
            except StorageError as error:
                LOG.warning("the audit log's end is not noted beside it: %s", error)

    def last_of(self, role: str) -> AuditEntry | None:
        """Return the newest row of actors with that role."""
        newest = select(audit).where(audit.c.role == role).order_by(audit.c.number.desc()).limit(1)
        with self._database.reading() as connection:
            row = connection.execute(newest).first()
        return None if row is None else _entry(row)

    def record(self, who: Actor, action: Action, subject: str, **detail: str | int | float) -> AuditEntry:
        """Add a row in a transaction of its own: durable when this returns."""
        with self._database.writing() as connection:
            entry = self.add(connection, who, action, subject, **detail)
        self.publish(entry)
        return entry


def read_entries(database: Database) -> Iterator[AuditEntry]:
    """Yield all rows in order."""
    after = 0
    while True:
        wanted = select(audit).where(audit.c.number > after).order_by(audit.c.number).limit(_AT_A_TIME)
        with database.reading() as connection:
            some = [_entry(row) for row in connection.execute(wanted)]
        yield from some
        if not some:
            return
        after = some[-1].number


def find_faults(
    entries: Iterator[AuditEntry], known: Sequence[tuple[str, Head]]
) -> tuple[list[str], Head | None]:
    """Check that every row is as it was written.

    Args:
        known: numbers and digests that were noted elsewhere, each with the place's name.

    Returns:
        A line for each fault, and the last row's number and digest (None: there is no row).
    """
    faults: list[str] = []
    wanted = {head.number for _, head in known}
    met: dict[int, str] = {}
    last = Head(0, _NOTHING)
    for entry in entries:
        if entry.number != last.number + 1:
            gap = f"entry {last.number + 1}" + (
                "" if entry.number == last.number + 2 else f" to {entry.number - 1}"
            )
            faults.append(f"{gap} is missing")
        elif entry.digest_after(last.digest) != entry.digest:
            faults.append(f"entry {entry.number} was changed, or stood after another entry")
        if entry.number in wanted:
            met[entry.number] = entry.digest
        last = entry.head
    if not last.number:
        faults.append("there is no entry at all, and every log has a first one")
    for where, head in known:
        if head.number not in met:
            faults.append(f"entry {head.number}, which {where} names, is missing; the last is {last.number}")
        elif met[head.number] != head.digest:
            faults.append(f"entry {head.number} or one before it is another one than {where} says")
    return faults, last if last.number else None


def read_head(file: Path) -> Head | None:
    """Read the number and digest that a state folder keeps; None: there is no such file.

    Raises:
        StateError: the file holds something else.
        StorageError: it cannot be read.
    """
    with storage(file):
        if not file.exists():
            return None
        text = file.read_text(encoding="ascii", errors="replace")
    try:
        return Head.parse(text)
    except UsageError as error:
        raise StateError(
            f"{file} holds no number and digest of the audit log; restore it, or delete it and compare the"
            " log with what was noted elsewhere: fedpeft server audit --verify"
        ) from error


def _last(connection: Connection) -> AuditEntry | None:
    row = connection.execute(select(audit).order_by(audit.c.number.desc()).limit(1)).first()
    return None if row is None else _entry(row)


def _holds(connection: Connection, head: Head) -> bool:
    found = connection.execute(
        select(audit.c.digest).where(audit.c.number == head.number)
    ).scalar_one_or_none()
    return found == head.digest


def _entry(row: Row[tuple[object, ...]]) -> AuditEntry:
    return AuditEntry(**row._mapping)
