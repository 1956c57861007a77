"""Files as streams of rows; no reader holds a whole file, but for a JSON array.

JSON lines and separated values are read by the standard library: it gives the number of a bad row and leaves
values as they are written (a columnar reader turns text that looks like a date into one, and "007" into 7).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

from fedpeft.data.columns import BATCH_ROWS, NumberedRow, read_arrow, read_parquet
from fedpeft.data.text_files import Reading, open_text, read_separated_values
from fedpeft.errors import DataError
from fedpeft.plugins import EntryTable, offers

__all__ = [
    "BATCH_ROWS",
    "LESSER",
    "READERS",
    "NumberedRow",
    "read_arrow",
    "read_csv",
    "read_jsonl",
    "read_lines",
    "read_parquet",
    "read_tsv",
]

CSV_FIELD_LIMIT = 2**31 - 1
_MOST_DIGITS = 4000  # of an integer; Python refuses longer ones, which are names and not numbers
_LINES = frozenset({".jsonl", ".ndjson"})  # suffixes of files that are lines and never one document
_MARK = "\ufeff"


def read_jsonl(path: Path, reading: Reading | None = None) -> Iterator[NumberedRow]:
    """One JSON object per line, blank lines skipped but counted; or one JSON array of objects.

    A file whose only value is an object with one list of objects in it is that list.

    Where rows are hidden, each line of a file of lines stands for itself: one that is no JSON object is a row
    without fields, which is left out later as any row that cannot be used.

    Raises:
        DataError: a line or an item is not a JSON object, or not in the file's encoding.
    """
    if reading is not None and reading.hides_rows and _LINES.intersection(map(str.lower, path.suffixes)):
        yield from _lone_lines(path, reading)
        return
    number = 0
    try:
        with open_text(path, reading or Reading()) as text:
            for number, piece in _pieces(text):
                yield from _first_rows(path, piece, number, text)
                break
            for place, piece in _pieces(text):
                yield number + place, _object(_parse(path, piece, number + place), path, number + place)
    except UnicodeError as error:
        raise DataError(
            f"{path}: row {number + 1} or one behind it is not JSON ({error}); save the file as UTF-8, or set"
            " data.encoding"
        ) from error


def _lone_lines(path: Path, reading: Reading) -> Iterator[NumberedRow]:
    """Every line as a row, whatever the others are."""
    with open_text(path, reading, keep_wrong=True) as text:
        for number, piece in _pieces(text):
            try:
                piece.encode()  # no surrogate stands for a byte of another encoding
                row = _object(_parse(path, piece, number), path, number)
            except (DataError, UnicodeError):
                row = {}
            yield number, row


def _pieces(text: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers; a mark may stand in front of any, as in joined files."""
    for number, line in enumerate(text, start=1):
        piece = line.strip().removeprefix(_MARK).strip()
        if piece:
            yield number, piece


def _first_rows(path: Path, piece: str, number: int, rest: TextIO) -> Iterator[NumberedRow]:
    """The row of the first line, or all rows if that is the beginning of a document."""
    if piece.startswith("["):
        yield from _read_document(path, piece + "\n" + rest.read(), number)
        return
    try:
        row = _parse(path, piece, number)
    except DataError as error:
        document = piece + "\n" + rest.read()
        try:
            yield from _read_document(path, document, number)
        except DataError:
            raise error from None
        return
    yield number, _object(row, path, number)


def _read_document(path: Path, text: str, line: int) -> Iterator[NumberedRow]:
    """The items of a JSON document that is no file of lines."""
    found = _parse(path, text, line)
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list) and value]
        found = lists[0] if len(lists) == 1 and isinstance(lists[0][0], dict) else [found]
    for number, row in enumerate(found, start=1):
        yield number, _object(row, path, number)


def _parse(path: Path, text: str, number: int) -> Any:
    try:
        try:
            return json.loads(text, object_pairs_hook=_once_each, parse_float=WrittenNumber)
        except ValueError as error:
            if "integer string conversion" not in str(error):
                raise
            return json.loads(
                text, object_pairs_hook=_once_each, parse_float=WrittenNumber, parse_int=_integer
            )
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: row {number} is not JSON ({error}); needs one JSON object per line, or an array of them"
        ) from error


class WrittenNumber(float):
    """A number that reads as it is written in its file: a price of 1.50 does not become 1.5."""

    __slots__ = ("_text",)
    _text: str

    def __new__(cls, text: str) -> Self:
        """Parse a number and keep its text."""
        made = super().__new__(cls, text)
        made._text = text
        return made

    def __str__(self) -> str:
        return self._text

    def __reduce__(self) -> tuple[type[Self], tuple[str]]:
        return type(self), (self._text,)


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= _MOST_DIGITS else digits


def _once_each(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names the field {twice!r} twice")
    return found


def _object(value: Any, path: Path, number: int) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{path}: row {number} is a JSON {type(value).__name__}; needs a JSON object")
    return value


def read_csv(path: Path, reading: Reading | None = None) -> Iterator[NumberedRow]:
    """Comma-separated values with a header line; every value stays text.

    Raises:
        DataError: no header, a row with more or fewer values than it, or text of another encoding.
    """
    return _read_separated(path, reading or Reading(), ",")


def read_tsv(path: Path, reading: Reading | None = None) -> Iterator[NumberedRow]:
    """As `read_csv`, with tabs."""
    return _read_separated(path, reading or Reading(), "\t")


def _read_separated(path: Path, reading: Reading, usual: str) -> Iterator[NumberedRow]:
    csv.field_size_limit(CSV_FIELD_LIMIT)  # the library's default of 128 KiB refuses long documents
    number = 0
    try:
        lines = read_separated_values(path, reading, usual)
        header = next(lines, None)
        if header is not None:
            header[:1] = [name.removeprefix(_MARK) for name in header[:1]]
        if header is None or len(set(header)) != len(header):
            raise DataError(f"{path}: needs a first line that names its columns, each once; got {header}")
        for values in lines:
            if not values:
                continue
            number += 1
            if len(values) != len(header):
                raise DataError(
                    f"{path}: row {number} has {len(values)} values for {len(header)} columns; "
                    "quote values that hold the separator or a line break"
                )
            yield number, dict(zip(header, values, strict=True))
    except (csv.Error, UnicodeError) as error:
        raise DataError(
            f"{path}: row {number + 1} cannot be read ({error}); needs UTF-8 text with a header, or"
            " data.encoding, data.separator and data.quoting that say what it is"
        ) from error


def read_lines(path: Path, reading: Reading | None = None) -> Iterator[NumberedRow]:
    """Plain text: each line that is not blank is a row with the field `text`.

    Raises:
        DataError: text of another encoding.
    """
    number = 0
    try:
        with open_text(path, reading or Reading()) as text:
            for number, line in enumerate(text, start=1):
                piece = line.rstrip("\r\n").removeprefix(_MARK)
                if piece.strip():
                    yield number, {"text": piece}
    except UnicodeError as error:
        raise DataError(
            f"{path}: row {number + 1} or one behind it cannot be read ({error}); save the file as UTF-8, or"
            " set data.encoding"
        ) from error


Reader = Callable[[Path, Reading], Iterator[NumberedRow]]

_OWN: Mapping[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".txt": read_lines,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}

READERS: EntryTable[Reader] = EntryTable("formats", _OWN, offers("__call__"))
"""The reader by a file's suffix, in lower case."""

LESSER = (".txt",)
"""Suffixes that a folder's files have beside its rows: read where it holds no others, or where named."""
