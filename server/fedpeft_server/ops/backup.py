"""A server's state as one file: taken while the server runs, checked when it is put back.

A tar file of: `manifest.json` (what is in it, with digests), `state.db` (the tables, the audit log among
them, always as SQLite, so that a backup of one database can be put into another), `audit.head` (the number
and digest of the log's last entry), `blobs/` (the contents that the tables refer to), `runs/` (adapters and
reports of runs that have ended), and on request `keys/` and `ca/`.

The tables are read in one transaction and hence are of one moment. Contents never change, they only come
before the transaction that names them and go after the one that forgets them: a content that is missing went
since that moment, and then both are taken again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, ValidationError

from fedpeft import __version__
from fedpeft.errors import StateError, StorageError, UsageError
from fedpeft.runtime.files import storage, sync_folder
from fedpeft_server.store import RunStatus, Store
from fedpeft_server.store.audit_log import HEAD, SERVER, Action, Head
from fedpeft_server.store.blobs import BlobFolder
from fedpeft_server.store.database import copy_tables
from fedpeft_server.store.store import BLOBS, DATABASE, RUNS

MANIFEST, KEYS, AUTHORITY = "manifest.json", "keys", "ca"
_ATTEMPTS = 20
_PIECE = 1 << 20
_WAITING = (
    "SELECT digest FROM updates WHERE body IS NULL AND NOT counted UNION SELECT digest FROM checkpoints"
)
_LOGGED = "SELECT name FROM sqlite_master WHERE name = 'audit'"  # databases of older versions have none
_LAST_ENTRY = "SELECT number, digest FROM audit ORDER BY number DESC LIMIT 1"
_ENDED = "SELECT id FROM runs WHERE status IN ('finished', 'failed', 'stopped')"


class Manifest(BaseModel):
    """What a backup says of itself.

    Attributes:
        taken_at: seconds since 1970.
        files: SHA-256 of each, by its name in the backup.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    software: str
    taken_at: float
    files: dict[str, str]


@dataclass(frozen=True)
class Places:
    """Where a server's state lies.

    Attributes:
        database: an SQLAlchemy URL; None: a file in `state`.
        keys, authority: folders of certificates; None: they are not part of it.
    """

    state: Path
    database: str | None = None
    keys: Path | None = None
    authority: Path | None = None


def back_up(places: Places, out: Path) -> Manifest:
    """Write a backup to a new file, readable by its owner only; the server may run meanwhile.

    Raises:
        StateError: there is no state, or it changes too fast to be taken.
        UsageError: the file is there already.
        StorageError: something cannot be read or written.
    """
    if out.exists():
        raise UsageError(f"{out} is there already; give another name")
    if not (places.state / BLOBS).is_dir():
        raise StateError(f"{places.state} holds no server's state; give --state as the server has it")
    with storage(out), tempfile.TemporaryDirectory(prefix=".backup-", dir=places.state) as name:
        staged = Path(name)  # beside the contents, so that they can be linked rather than copied
        for _ in range(_ATTEMPTS):
            if _stage(places, staged):
                break
        else:
            raise StateError(f"{places.state} changes too fast to be backed up; try again")
        return _pack(staged, out)


def _stage(places: Places, staged: Path) -> bool:
    """Gather all parts in a folder; whether they are of one moment."""
    shutil.rmtree(staged / BLOBS, ignore_errors=True)
    (staged / DATABASE).unlink(missing_ok=True)
    _snapshot(places, staged / DATABASE)
    with closing(sqlite3.connect(staged / DATABASE)) as tables:
        contents = [row[0] for row in tables.execute(_WAITING)]
        ended = [row[0] for row in tables.execute(_ENDED)]
        logged = tables.execute(_LOGGED).fetchone() is not None
        last = tables.execute(_LAST_ENTRY).fetchone() if logged else None
    (staged / HEAD).unlink(missing_ok=True)
    if last is not None:
        (staged / HEAD).write_text(f"{Head(*last)}\n", encoding="ascii")
    there = BlobFolder(places.state / BLOBS)
    for digest in contents:
        place = staged / BLOBS / digest[:2] / digest
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(there.path(digest), place)
        except FileNotFoundError:
            return False
    folders = {RUNS + "/" + run: places.state / RUNS / run for run in ended}
    folders |= {
        name: at for name, at in ((KEYS, places.keys), (AUTHORITY, places.authority)) if at is not None
    }
    for name, folder in folders.items():
        if folder.is_dir() and not (staged / name).exists():
            shutil.copytree(folder, staged / name)
    return True


def _snapshot(places: Places, out: Path) -> None:
    """The tables of one moment, as an SQLite file."""
    if places.database is not None and not places.database.startswith("sqlite"):
        copy_tables(places.database, f"sqlite:///{out}")
        return
    own = places.state / DATABASE if places.database is None else Path(places.database.partition("///")[2])
    if not own.is_file():
        raise StateError(f"{own} is not there; give --state and --database as the server has them")
    try:
        with (
            closing(sqlite3.connect(f"file:{own}?mode=ro", uri=True)) as live,
            closing(sqlite3.connect(out)) as copy,
        ):
            live.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.Error as error:
        raise StorageError(f"{own}: cannot be read ({error}); check its permissions") from error


def _pack(staged: Path, out: Path) -> Manifest:
    """All files below a folder as one, with a manifest at its head."""
    files = {
        path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()
    }
    manifest = Manifest(
        software=f"fedpeft {__version__}",
        taken_at=time.time(),
        files={name: _digest(path) for name, path in files.items()},
    )
    partial = out.with_name(f".partial-{out.name}")
    try:
        with open(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                head = manifest.model_dump_json(indent=1).encode()
                member = tarfile.TarInfo(MANIFEST)
                member.size, member.mode, member.mtime = len(head), 0o600, int(manifest.taken_at)
                tar.addfile(member, io.BytesIO(head))
                for name, path in files.items():
                    tar.add(path, arcname=name, filter=_nobodys)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(out.parent)
    return manifest


def _nobodys(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o600
    return member


def restore(file: Path, places: Places, *, nothing_since: bool = False) -> Manifest:
    """Put a backup where no state is; every file is checked before any is put in its place.

    Runs that promise privacy and had not ended are stopped: what they have released since the backup was
    taken was not charged in it, and going on would spend that again.

    Args:
        places: `keys` and `authority` are written if they are given; the backup must hold them then.
        nothing_since: the server released nothing after the backup, so that private runs may go on.

    Raises:
        UsageError: there is a state already, or the backup lacks what was asked for.
        StateError: it is no backup, or a file in it is damaged.
        StorageError: something cannot be read or written.
    """
    for place in (places.state, places.keys, places.authority):
        if place is not None and place.exists() and any(place.iterdir()):
            raise UsageError(f"{place} is there already and not empty; a backup is put where nothing is")
    with storage(places.state):
        places.state.parent.mkdir(parents=True, exist_ok=True)
    with _unpack_checked(file, places.state.parent) as (manifest, unpacked):
        for name, place in ((KEYS, places.keys), (AUTHORITY, places.authority)):
            if place is not None and not (unpacked / name).is_dir():
                raise UsageError(f"{file} holds no {name}; it was taken without --with-keys")
        if places.database is not None:
            copy_tables(f"sqlite:///{unpacked / DATABASE}", places.database)
            (unpacked / DATABASE).unlink()
        for name, place in ((KEYS, places.keys), (AUTHORITY, places.authority)):
            if place is not None:
                _move(unpacked / name, place)
            shutil.rmtree(unpacked / name, ignore_errors=True)
        (unpacked / BLOBS).mkdir(exist_ok=True)
        _move(unpacked, places.state)
    taken = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(manifest.taken_at))
    with Store(places.state, url=places.database, migrate=True) as store:
        store.audit.record(SERVER, Action.RESTORED, "", taken=taken, software=manifest.software)
        if not nothing_since:
            _stop_private(store, taken)
    return manifest


def _move(folder: Path, place: Path) -> None:
    with storage(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists():
            place.rmdir()
        folder.chmod(0o700)
        os.replace(folder, place)
        sync_folder(place.parent)


@contextmanager
def _unpack_checked(file: Path, beside: Path) -> Iterator[tuple[Manifest, Path]]:
    """A backup unpacked into a passing folder, all of it verified."""
    unpacked = Path(tempfile.mkdtemp(prefix=".restore-", dir=beside))
    try:
        with storage(file), file.open("rb") as raw:
            try:
                with tarfile.open(fileobj=raw, mode="r:") as tar:
                    manifest = _manifest(tar, file)
                    for member in tar:
                        _unpack(tar, member, unpacked, manifest.files, file)
            except (tarfile.TarError, EOFError) as error:
                raise StateError(f"{file} is no backup of a server, or is cut off ({error})") from error
        missing = [name for name in manifest.files if not (unpacked / name).is_file()]
        if missing or DATABASE not in manifest.files:
            raise StateError(f"{file}: {len(missing)} files are missing from it; take another backup")
        yield manifest, unpacked
    finally:
        shutil.rmtree(unpacked, ignore_errors=True)


def _manifest(tar: tarfile.TarFile, file: Path) -> Manifest:
    first = tar.next()
    content = tar.extractfile(first) if first is not None and first.name == MANIFEST else None
    if content is None:
        raise StateError(f"{file} is no backup of a server: it does not begin with {MANIFEST}")
    try:
        table = json.loads(content.read())
        if isinstance(table, Mapping) and table.get("format") != 1:
            raise StateError(
                f"{file} is of format {table.get('format')!r}, this fedpeft reads 1; use its own"
            )
        return Manifest.model_validate(table)
    except (ValueError, ValidationError) as error:
        raise StateError(f"{file}: its {MANIFEST} is damaged; take another backup") from error


def _unpack(
    tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, files: Mapping[str, str], file: Path
) -> None:
    """One file, if it is what the manifest says; nothing of it leaves the folder."""
    if member.name == MANIFEST:
        return
    parts = PurePosixPath(member.name).parts
    source = tar.extractfile(member) if member.isreg() and member.name in files else None
    if source is None or member.name.startswith("/") or ".." in parts:
        raise StateError(f"{file} holds {member.name!r}, which its {MANIFEST} does not name")
    place, digest = folder / member.name, hashlib.sha256()
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as out:
        while piece := source.read(_PIECE):
            digest.update(piece)
            out.write(piece)
        out.flush()
        os.fsync(out.fileno())
    if digest.hexdigest() != files[member.name]:
        raise StateError(f"{file}: {member.name} is damaged; take another backup")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stop_private(store: Store, taken: str) -> None:
    """End what may have spent more than the backup knows."""
    why = f"restored from a backup of {taken}: what it has spent since then is not known; submit it again"
    for stored in store.runs.list_unended():
        if stored.problem or stored.run.privacy is not None:  # one that cannot be read may be private
            store.runs.set_status(stored.id, RunStatus.STOPPED, why)
