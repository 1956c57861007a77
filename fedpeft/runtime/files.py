"""Files that are either whole or not there: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedpeft.errors import FedPEFTError, StateError, StorageError

_TEMPORARY = ".partial-"


def storage_error(path: Path, error: OSError) -> StorageError:
    """An operating-system error as one line with a remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"{path}: no disk space is left; free some and resume the run, nothing is half-written"
        )
    return StorageError(f"{path}: {error.strerror or error}; check the path and its permissions")


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn every `OSError` inside into a `StorageError` that names `path`."""
    try:
        yield
    except FedPEFTError:
        raise
    except OSError as error:
        raise storage_error(path, error) from error


def write_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace `path` by `content`; a crash leaves either the old file or the new one.

    Args:
        mode: the file's permissions; they never are wider, not even for a moment.

    Raises:
        StorageError: the disk is full or the folder can't be written.
    """
    with storage(path):
        handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, mode)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def keep_newest(folder: Path, pattern: str, most: int) -> None:
    """Delete a folder's files of that pattern but the newest.

    Raises:
        StorageError: the folder cannot be read or written.
    """
    with storage(folder):
        files = sorted(folder.glob(pattern), key=lambda file: file.stat().st_mtime_ns)
        for old in files[:-most]:
            old.unlink(missing_ok=True)


@contextmanager
def folder_atomically(path: Path, *, file_mode: int | None = 0o644) -> Iterator[Path]:
    """Fill a new folder, then put it in the place of `path` (which is removed if it is there).

    Args:
        file_mode: of every file, since some libraries write files that only their owner can read; None: as
            they were written.

    Raises:
        StorageError: the disk is full or the parent can't be written.
    """
    with storage(path):
        fresh = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=path.parent))
        try:
            yield fresh
            for file in fresh.rglob("*"):
                if file.is_file():
                    if file_mode is not None:
                        file.chmod(file_mode)
                    _sync(file)
            fresh.chmod(0o755)
            if path.exists():
                shutil.rmtree(path)
            os.replace(fresh, path)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        sync_folder(path.parent)


def hold_lock(path: Path, *, in_use: str, mode: int = 0o600) -> int:
    """Lock a file, made if it is missing, for this process alone: until it closes what is returned, or ends.

    Args:
        in_use: what is said if another process holds it.

    Raises:
        StateError: another process holds it.
        StorageError: it cannot be made.
    """
    with storage(path.parent):
        lock = os.open(path, os.O_RDWR | os.O_CREAT, mode)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise StateError(in_use) from error
    return lock


def append_line(path: Path, line: str) -> None:
    """Append one line and flush it to the disk.

    Raises:
        StorageError: the disk is full or the file can't be written.
    """
    with storage(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def make_private_folder(path: Path, *, holds: str) -> Path:
    """Make a folder that only its owner may read, or check that one that is there is so.

    Args:
        holds: what others could read in it, for the error's text.

    Raises:
        StateError: others may read it.
        StorageError: it cannot be made.
    """
    with storage(path):
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        mode = stat.S_IMODE(path.stat().st_mode)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise StateError(
            f"{path}: its mode is {mode:04o}, so others on this machine could read {holds}; run: chmod 700"
            f" '{path}'"
        )
    return path


def sync_folder(path: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partial(folder: Path) -> None:
    """Delete what a crash left half-written in `folder`."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
