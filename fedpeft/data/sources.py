"""From paths to parts that can be read: files, folders and patterns."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedpeft.data.columns import find_saved_set
from fedpeft.data.describe import show
from fedpeft.data.labels import natural_key
from fedpeft.data.readers import LESSER, READERS, NumberedRow, Reader, read_arrow
from fedpeft.data.text_files import PACKED, Reading, describe_suffixes, stem_of, suffix_of
from fedpeft.errors import DataError


@dataclass(frozen=True)
class Part:
    """One file or data set.

    Attributes:
        name: the file's stem, its folder's or the data set's name; a client's name where one is one client.
        source: the path or what the run file calls it, for messages.
        rows: opens it anew at each call.
        owner: equal for parts of one client, where files or folders are clients; "": a client of its own.
    """

    name: str
    source: str
    rows: Callable[[], Iterator[NumberedRow]]
    owner: str = ""


def find_files(source: str, reading: Reading | None = None, *, split: str = "train") -> list[Part]:
    """The parts of a file, a folder or a glob pattern.

    A folder stands for the files in it whose suffix we read, in natural order; for the data set that
    `datasets` saved in it; or else for the folders in it, each of which is one client. Hidden files are left
    out. Only what follows the folders that are there is a pattern: signs such as brackets in their names are
    taken as they are.

    Args:
        reading: how text is read; None: found out from each file.
        split: of a folder of saved splits.

    Raises:
        DataError: nothing is there, or a file's suffix has no reader.
    """
    try:
        return _find(source, reading or Reading(), split)
    except (OSError, ValueError) as error:  # such as a name of more signs than names have
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{show(source)}: no data can be there ({reason}); give a path") from error


def _find(source: str, how: Reading, split: str) -> list[Part]:
    path = Path(source)
    if path.is_file():
        return [_file(path, how)]
    if path.is_dir():
        return _folder(path, how, split) or _nothing(source)
    found = [Path(item) for item in _matches(source) if Path(item).is_file()]
    parts = [_file(item, how) for item in _in_order(found)] or _nothing(source)
    return _by_folder(parts)


def _matches(source: str) -> list[str]:
    """The paths that a pattern matches; folders at its beginning that are there are no patterns."""
    path = Path(source)
    parts = list(path.parts)
    known = Path(parts.pop(0)) if path.is_absolute() and parts else Path()
    while parts and (known / parts[0]).exists():
        known = known / parts.pop(0)
    return glob.glob(os.path.join(glob.escape(str(known)), *parts), recursive=True)


def _folder(path: Path, how: Reading, split: str) -> list[Part]:
    saved = find_saved_set(path, split)
    if saved is not None:
        return [_find_saved(path, saved[1])]
    files = _readable(path)
    if files:
        return [_file(item, how) for item in files]
    return [
        replace(_file(item, how), name=folder.name, owner=str(folder))
        for folder in _in_order(item for item in path.iterdir() if item.is_dir() and not _is_hidden(item))
        for item in _readable(folder)
    ]


def _by_folder(parts: list[Part]) -> list[Part]:
    """Where files of a pattern share names (`clients/*/train.jsonl`), their folders tell clients apart."""
    names = [part.name for part in parts]
    if len(set(names)) == len(names):
        return parts
    folders = [Path(part.source).parent for part in parts]
    return [
        replace(part, name=folder.name, owner=str(folder))
        for part, folder in zip(parts, folders, strict=True)
    ]


def _readable(folder: Path) -> list[Path]:
    """The files of a folder that hold rows; plain text counts only where it holds nothing else."""
    files = [item for item in folder.iterdir() if item.is_file() and not _is_hidden(item)]
    found = [item for item in files if suffix_of(item) in READERS]
    return _in_order([item for item in found if suffix_of(item) not in LESSER] or found)


def _is_hidden(path: Path) -> bool:
    """Whether a name begins with a dot, as what macOS writes beside each file does (`._rows.jsonl`)."""
    return path.name.startswith(".")


def _in_order(paths: Iterator[Path] | Sequence[Path]) -> list[Path]:
    return sorted(paths, key=lambda item: natural_key(str(item)))


def _nothing(source: str) -> list[Part]:
    raise DataError(
        f"{source}: no data is there; give a {describe_suffixes(tuple(READERS))} file, a folder or pattern"
        " of such files (relative to the run file or the working folder)"
    )


def _file(path: Path, how: Reading) -> Part:
    reader, packed = READERS.get(suffix_of(path)), path.suffix.lower() in PACKED
    if reader is None or (packed and suffix_of(path) in (".parquet", ".arrow")):
        suffix = "".join(path.suffixes[-2:]) if packed else path.suffix
        raise DataError(
            f"{path}: no reader for '{suffix}' files; needs one of {describe_suffixes(tuple(READERS))}"
        )
    return Part(stem_of(path), str(path), lambda: _open(reader, path, how))


def _find_saved(folder: Path, files: Sequence[Path]) -> Part:
    def rows() -> Iterator[NumberedRow]:
        number = 0
        for file in files:
            for _, row in _open(read_arrow, file, Reading()):
                number += 1
                yield number, row

    return Part(folder.name, str(folder), rows)


def _open(reader: Reader, path: Path, how: Reading) -> Iterator[NumberedRow]:
    try:
        yield from reader(path, how)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); check that it may be read"
        ) from error
