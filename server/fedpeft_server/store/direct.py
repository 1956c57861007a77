"""Large files past the page cache, where the system can do that.

A page of the cache is taken, filled and later written out for every 4 KiB, which costs a server more than
anything else that it does with an update of megabytes, and evicts what others need. An update is written once
and read once.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEAST_BYTES = 4 << 20  # below, the cache is cheaper than a trip to the disk
_BLOCK = 4096  # what addresses, offsets and lengths are multiples of
_BUFFER = 1 << 20
_FLAG = getattr(os, "O_DIRECT", 0)
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)  # by file systems that cannot, and for blocks of another size


class DirectAppender:
    """Appends to a file, a buffer at a time; what is less than a buffer waits for `rest`.

    One thread at a time uses it. Its errors are the system's.

    Args:
        offset: where the file ends.
    """

    def __init__(self, path: Path, offset: int) -> None:
        self._buffer = _pages(_BUFFER)
        self._plain = os.open(path, os.O_RDWR)
        self._direct = _open(path, os.O_WRONLY)
        self._start = offset // _BLOCK * _BLOCK
        self._filled = offset - self._start
        if self._filled:
            self._buffer[: self._filled] = os.pread(self._plain, self._filled, self._start)

    def write(self, data: bytes) -> None:
        """Take some bytes, and write whole buffers."""
        rest = memoryview(data)
        while len(rest):
            taken = min(len(rest), _BUFFER - self._filled)
            self._buffer[self._filled : self._filled + taken] = rest[:taken]
            self._filled += taken
            rest = rest[taken:]
            if self._filled == _BUFFER:
                self._out()

    def rest(self) -> None:
        """Write what is left, through the cache; nothing more can be written."""
        with memoryview(self._buffer) as whole, whole[: self._filled] as left:
            _all(self._plain, left, self._start)
        self._start, self._filled = self._start + self._filled, 0

    def close(self) -> None:
        """Let go of the file; what was not written is lost."""
        for fd in (self._plain, self._direct):
            if fd is not None:
                os.close(fd)
        self._buffer.close()

    def _out(self) -> None:
        with memoryview(self._buffer) as whole:
            try:
                _all(self._plain if self._direct is None else self._direct, whole, self._start)
            except OSError as error:
                if self._direct is None or error.errno not in _REFUSED:
                    raise
                os.close(self._direct)
                self._direct = None
                _all(self._plain, whole, self._start)
        self._start, self._filled = self._start + _BUFFER, 0


@contextmanager
def reading_whole(path: Path) -> Iterator[bytes | memoryview]:
    """A whole file, in memory while the block lasts; raises what the system does."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        fd = _open(path, os.O_RDONLY) if size >= LEAST_BYTES else None
        if fd is None:
            yield file.read()
            return
        try:
            with _pages(size) as buffer, memoryview(buffer) as whole:
                if not _read(fd, whole, size):
                    yield file.read()
                    return
                with whole[:size] as content:
                    yield content
        finally:
            os.close(fd)


def _pages(size: int) -> mmap.mmap:
    """Memory of so many bytes or a little more, in large pages where there are any: each page takes 2 us."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    buffer = mmap.mmap(-1, -(-size // _BLOCK) * _BLOCK, flags=private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


def _read(fd: int, whole: memoryview, size: int) -> bool:
    """Read past the cache; False if the file system refuses that."""
    came = 0
    try:
        while came < size and (more := os.preadv(fd, [whole[came:]], came)):
            came += more
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
    return came >= size


def _open(path: Path, flags: int) -> int | None:
    """A descriptor that bypasses the cache; None where there is none to be had."""
    if not _FLAG:
        return None
    try:
        return os.open(path, flags | _FLAG)
    except OSError as error:
        if error.errno in _REFUSED:
            return None
        raise


def _all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of it there; the system may take less at a time."""
    while len(data):
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
