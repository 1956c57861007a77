"""Large contents in a folder, each under its own SHA-256: written once, never changed, gone when unused."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedpeft.errors import LimitError, StateError, UpdateError
from fedpeft.runtime.crash_points import crash_point
from fedpeft.runtime.files import storage, sync_folder
from fedpeft_server.store.direct import LEAST_BYTES, DirectAppender, reading_whole

_TEMPORARY, _INCOMING = ".partial-", "incoming"
_PIECE = 1 << 20


def digest_of(content: bytes) -> str:
    """SHA-256, hexadecimal: a content's name."""
    return hashlib.sha256(content).hexdigest()


class BlobFolder:
    """A folder of contents. A name that is there stands for whole content: it was renamed after its flush.

    Raises:
        StorageError: the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with storage(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where that content lies, if it is there."""
        return self.folder / digest[:2] / digest

    def put(self, content: bytes) -> str:
        """Keep `content` durably; its digest.

        Raises:
            StorageError: no space, or the folder cannot be written.
        """
        digest = digest_of(content)
        place = self.path(digest)
        with storage(place):
            if place.exists() and place.stat().st_size == len(content):
                return digest
            self._make(place.parent)
            handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=place.parent)
            try:
                crash_point("server.blob.begun")
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                    file.flush()
                    crash_point("server.blob.written")
                    os.fsync(file.fileno())
                self._name(Path(name), place)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        return digest

    def has(self, digest: str) -> bool:
        """Whether the whole content is there."""
        return self.path(digest).is_file()

    def begin(self, digest: str, size: int) -> PartialBlobFile:
        """Go on with a content that comes in pieces, or begin it.

        Raises:
            StorageError: it cannot be written.
            LimitError: another upload of it is under way.
            UpdateError: `digest` is none.
        """
        if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise UpdateError(f"{digest[:20]!r} is no SHA-256; announce the content's digest in hexadecimal")
        return PartialBlobFile(self, self.folder / _INCOMING / digest, digest, size)

    @contextmanager
    def reading(self, digest: str) -> Iterator[bytes | memoryview]:
        """A whole content, unverified, while the block lasts.

        Raises:
            StateError: it is not there.
            StorageError: it cannot be read.
        """
        place = self._present(digest)
        with ExitStack() as stack:
            with storage(place):
                content = stack.enter_context(reading_whole(place))
            yield content

    def adopt(self, file: Path, digest: str) -> None:
        """Take over a file of this folder whose content was flushed and has that digest.

        Raises:
            StorageError: it cannot be moved.
        """
        place = self.path(digest)
        with storage(place):
            self._make(place.parent)
            self._name(file, place)

    def get(self, digest: str) -> bytes:
        """The content of that digest.

        Raises:
            StateError: it is missing, or the disk gives back something else.
            StorageError: it cannot be read.
        """
        place = self._present(digest)
        with storage(place):
            content = place.read_bytes()
        if digest_of(content) != digest:
            raise StateError(f"{place} is corrupt; restore the state folder from a backup")
        return content

    def remove(self, digests: Collection[str]) -> None:
        """Delete contents; those that aren't there are gone already."""
        for digest in digests:
            with storage(self.folder):
                self.path(digest).unlink(missing_ok=True)
            crash_point("server.blob.removed")

    def collect(self, used: Collection[str], *, older_than_s: float = 0.0) -> int:
        """Delete what is not `used` and wasn't touched for a while, half-written files too.

        Returns:
            How many files went.
        """
        keep, gone = set(used), 0
        before = time.time() - older_than_s
        with storage(self.folder):
            for file in self.folder.glob("*/*"):
                if file.name not in keep and file.stat().st_mtime <= before:
                    file.unlink(missing_ok=True)
                    gone += 1
        return gone

    def _present(self, digest: str) -> Path:
        place = self.path(digest)
        if not place.is_file():
            raise StateError(f"{place} is missing; restore the state folder from a backup")
        return place

    def _make(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(exist_ok=True)
            sync_folder(self.folder)

    def _name(self, file: Path, place: Path) -> None:
        """The rename that makes a flushed file count, and its own flush."""
        crash_point("server.blob.flushed")
        os.chmod(file, 0o600)
        os.replace(file, place)
        crash_point("server.blob.renamed")
        sync_folder(place.parent)
        crash_point("server.blob.durable")


class PartialBlobFile:
    """A content on its way in, in a file that outlives the process; one thread at a time uses it."""

    def __init__(self, blobs: BlobFolder, path: Path, digest: str, size: int) -> None:
        self._blobs, self._path, self._digest, self._size = blobs, path, digest, size
        with storage(path):
            path.parent.mkdir(exist_ok=True)
            self._file = path.open("a+b")
        try:
            self._lock()
            self._hash = hashlib.sha256()
            self.offset = 0
            self._read_again()
            self._appender: DirectAppender | None = None
            if size >= LEAST_BYTES:
                with storage(path):
                    self._appender = DirectAppender(path, self.offset)
        except BaseException:
            self._file.close()
            raise

    def write(self, data: bytes) -> None:
        """Append.

        Raises:
            UpdateError: beyond the announced size.
            StorageError: the disk is full.
        """
        if self.offset + len(data) > self._size:
            raise UpdateError(f"blob {self._digest[:12]}: more than the announced {self._size} bytes came")
        with storage(self._path):
            if self._appender is not None:
                self._appender.write(data)
            else:
                self._file.write(data)
                self._file.flush()
        self._hash.update(data)
        self.offset += len(data)
        crash_point("server.upload.piece")

    def finish(self) -> None:
        """Verify size and digest and make the content durable.

        Raises:
            UpdateError: bytes are missing, or they are not those announced; then the file is gone.
            StorageError: it cannot be flushed or moved.
        """
        if self.offset != self._size:
            raise UpdateError(
                f"blob {self._digest[:12]}: {self.offset} of {self._size} bytes came; send the rest"
            )
        if self._hash.hexdigest() != self._digest:
            self._path.unlink(missing_ok=True)
            self.close()
            raise UpdateError(
                f"blob {self._digest[:12]}: other bytes came than were announced; send it again"
            )
        with storage(self._path):
            if self._appender is not None:
                self._appender.rest()
            crash_point("server.upload.whole")
            os.fsync(self._file.fileno())
            self._blobs.adopt(self._path, self._digest)
        self.close()

    def close(self) -> None:
        """Put it aside; what came stays for the next attempt."""
        appender, self._appender = self._appender, None
        try:
            if appender is not None:
                with storage(self._path):
                    appender.rest()
        finally:
            if appender is not None:
                appender.close()
            self._file.close()

    def _lock(self) -> None:
        """A lock of the file itself: it is gone with the process."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise self._busy_error() from error
        with storage(self._path):
            if not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                raise self._busy_error()  # finished by another between our opening and our lock

    def _busy_error(self) -> LimitError:
        return LimitError(f"blob {self._digest[:12]}: another upload of it is under way; ask again")

    def _read_again(self) -> None:
        """Hash what an earlier attempt left; more than was announced is no use."""
        with storage(self._path):
            self._file.seek(0)
            while piece := self._file.read(_PIECE):
                self._hash.update(piece)
                self.offset += len(piece)
            if self.offset > self._size:
                self._file.truncate(0)
                self._hash, self.offset = hashlib.sha256(), 0
