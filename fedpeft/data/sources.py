"""From paths to parts that can be read: files, folders and patterns."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedpeft.data.describe import listed
from fedpeft.data.labels import natural_key
from fedpeft.data.readers import READERS, NumberedRow
from fedpeft.errors import DataError


@dataclass(frozen=True)
class Part:
    """One file or data set.

    Attributes:
        name: the file's stem or the data set's name; a client's name where one file is one client.
        source: the path or what the run file calls it, for messages.
        rows: opens it anew at each call.
    """

    name: str
    source: str
    rows: Callable[[], Iterator[NumberedRow]]


def find_files(source: str) -> list[Part]:
    """The parts of a file, a folder or a glob pattern.

    A folder stands for the files in it whose suffix we read (not its subfolders); files of folders and
    patterns come in natural order of their paths.

    Raises:
        DataError: nothing is there, or a file's suffix has no reader.
    """
    path = Path(source)
    if path.is_file():
        return [_file(path)]
    if path.is_dir():
        found = [item for item in path.iterdir() if item.is_file() and item.suffix.lower() in READERS]
    else:
        found = [Path(item) for item in glob.glob(source, recursive=True) if Path(item).is_file()]
    if not found:
        raise DataError(
            f"{source}: no data is there; give a {', '.join(READERS)} file, a folder or pattern of such "
            f"files (relative to the run file or the working folder)"
        )
    return [_file(item) for item in sorted(found, key=lambda item: natural_key(str(item)))]


def _file(path: Path) -> Part:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: no reader for '{path.suffix}' files; needs one of {listed(READERS)}")
    return Part(path.stem, str(path), lambda: _open(reader, path))


def _open(reader: Callable[[Path], Iterator[NumberedRow]], path: Path) -> Iterator[NumberedRow]:
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); check that it may be read"
        ) from error
