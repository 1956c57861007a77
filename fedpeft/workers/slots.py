"""Memory that two processes map: a call goes over in it and its result comes back.

Pipes pass a megabyte on in pieces, the two processes waking each other, and a fresh file needs fresh pages
each time. A slot's pages stay; only a few bytes per call go through a pipe.
"""

from __future__ import annotations

import mmap
import os
import pickle
from pathlib import Path
from typing import Any

from fedpeft.errors import StorageError

_FIRST_BYTES = 1 << 16
_SPARE = 1.25  # a slot that must grow grows by so much more than it must


class Slot:
    """One end of a slot: a file that holds one pickled value at a time, and grows with it.

    Args:
        path: the file; made if it isn't there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if os.fstat(self._file).st_size < _FIRST_BYTES:
            self._allocate(_FIRST_BYTES)
        self._map = self._open_map()
        self._place = 0

    def dump(self, value: Any) -> int:
        """Put a value in; returns its size in bytes.

        Raises:
            StorageError: no memory is left for it.
            Exception: it can't be pickled.
        """
        self._place = 0
        pickle.dump(value, self, protocol=pickle.HIGHEST_PROTOCOL)
        return self._place

    def load(self, size: int) -> Any:
        """Take a value of `size` bytes out, which the process at the other end has put in."""
        if size > len(self._map):
            self._map.close()
            self._map = self._open_map()
        with memoryview(self._map) as whole, whole[:size] as pickled:
            return pickle.loads(pickled)

    def write(self, piece: bytes | memoryview | pickle.PickleBuffer) -> int:
        """The pickler's way in."""
        view = piece.raw() if isinstance(piece, pickle.PickleBuffer) else memoryview(piece)
        end = self._place + view.nbytes
        if end > len(self._map):
            self._allocate(int(end * _SPARE))
            self._map.close()
            self._map = self._open_map()
        self._map[self._place : end] = view
        self._place = end
        return view.nbytes

    def close(self) -> None:
        """Unmap; the file stays for whoever owns its folder."""
        self._map.close()
        os.close(self._file)

    def _allocate(self, size: int) -> None:
        """Reserve the bytes now: writing to mapped memory that isn't there would kill the process."""
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file, 0, size)
            else:
                os.truncate(self._file, size)
        except OSError as error:
            raise StorageError(
                f"{self._path.parent}: {size} bytes cannot be written ({error.strerror}); free space or"
                " set TMPDIR"
            ) from error

    def _open_map(self) -> mmap.mmap:
        return mmap.mmap(self._file, os.fstat(self._file).st_size)
