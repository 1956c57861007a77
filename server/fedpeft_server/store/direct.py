"""Large files past the page cache, where the system can do that.

A page of the cache is taken, filled and later written out for every 4 KiB, which costs a server more than
anything else that it does with an update of megabytes, and evicts what others need. An update is written once
and read once.
"""

from __future__ import annotations

import errno
import mmap
import os
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
        self._buffer = mmap.mmap(-1, _BUFFER)  # begins at a page
        self._plain = os.open(path, os.O_RDWR)
        self._direct = _opened(path, os.O_WRONLY)
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


def read_whole(path: Path) -> bytes:
    """A whole file; raises what the system does."""
    size = path.stat().st_size
    fd = _opened(path, os.O_RDONLY) if size >= LEAST_BYTES else None
    if fd is None:
        return path.read_bytes()
    try:
        with mmap.mmap(-1, -(-size // _BLOCK) * _BLOCK) as buffer:
            came = 0
            with memoryview(buffer) as whole:
                while came < size and (more := os.preadv(fd, [whole[came:]], came)):
                    came += more
            return buffer[:size] if came >= size else path.read_bytes()
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return path.read_bytes()
    finally:
        os.close(fd)


def _opened(path: Path, flags: int) -> int | None:
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
