"""Opening files of text: what they are packed with, how their letters are encoded, how values are kept apart.

Each is found out from the file, said where it isn't the usual one, and can be set in the run file.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from fedpeft.data.describe import list_names
from fedpeft.errors import DataError

Quoting = Literal["csv", "none"]
LEGACY = "windows-1252"  # what a file that is not UTF-8 is taken for
SEPARATORS = (",", ";", "\t", "|")
_NAMES = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_BLOCK = 1 << 20
_SAMPLE_LINES = 50
_QUOTED = re.compile(r'"(?:[^"]|"")*"')


@dataclass(frozen=True)
class Reading:
    """How files are to be read, and what was found out about them.

    Attributes:
        encoding, separator, quoting: as the run file sets them; None: found out for each file.
        hides_rows: nothing may be found out from rows, since one would change how others read: the mark at
            a file's beginning and its header alone count.
        notes: what readers found that a person should know, one line each; readers add to it.
    """

    encoding: str | None = None
    separator: str | None = None
    quoting: Quoting | None = None
    hides_rows: bool = False
    notes: list[str] = field(default_factory=list)

    def note(self, line: str) -> None:
        """Say something once."""
        if line not in self.notes:
            self.notes.append(line)


def _open_zst(path: Path) -> IO[bytes]:
    import pyarrow as pa  # the standard library has no such reader yet

    stream: Any = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    return io.BufferedReader(stream)


PACKED: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.GzipFile,
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zst,
}
"""How a file is unpacked while it is read, by its last suffix."""


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file, unpacked."""
    unpacked = PACKED.get(path.suffix.lower())
    if unpacked is None:
        return path.open("rb")
    opened: IO[bytes] = unpacked(path)
    return opened


@contextmanager
def open_text(path: Path, reading: Reading, *, keep_wrong: bool = False) -> Iterator[io.TextIOWrapper]:
    """Open a file as text; line breaks stay as they are.

    Args:
        keep_wrong: bytes that are none of the encoding become surrogates (or, where it is not UTF-8,
            replacement characters), instead of an error.

    Raises:
        DataError: no encoding fits, or the packing is damaged.
    """
    with unpacking(path):
        encoding = reading.encoding or _encoding_of(path, by_mark=reading.hides_rows)
        if encoding == LEGACY and reading.encoding is None:
            reading.note(f"{path} is not UTF-8: read as {LEGACY}; if it is another, set data.encoding")
        utf8 = encoding.lower().replace("_", "-").startswith("utf-8")
        errors = ("surrogateescape" if utf8 else "replace") if keep_wrong else "strict"
        with open_bytes(path) as raw, io.TextIOWrapper(raw, encoding, errors, newline="") as text:
            yield text


@contextmanager
def unpacking(path: Path) -> Iterator[None]:
    """Turn what a damaged archive raises into a `DataError`."""
    suffix = path.suffix.lower()
    if suffix not in PACKED:
        yield
        return
    errors: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
    if suffix == ".zst":
        import pyarrow as pa

        errors = (pa.ArrowException, OSError)
    try:
        yield
    except errors as error:
        raise DataError(f"{path}: cannot be unpacked ({error}); pack it again") from error


def _encoding_of(path: Path, *, by_mark: bool) -> str:
    """Find out a file's encoding: by its mark, or by whether it is UTF-8 all through."""
    with open_bytes(path) as raw:
        head = raw.read(4)
        for mark, name in (
            (codecs.BOM_UTF8, "utf-8-sig"),
            (codecs.BOM_UTF32_LE, "utf-32"),
            (codecs.BOM_UTF16_LE, "utf-16"),
            (codecs.BOM_UTF16_BE, "utf-16"),
        ):
            if head.startswith(mark):
                return name
        if by_mark:
            return "utf-8"
        if len(head) >= 2 and 0 in head[:2] and head[:2] != b"\0\0":  # a Latin letter and half of its code
            return "utf-16-le" if head[1] == 0 else "utf-16-be"
        letters, wrong = _count_letters(head, raw)
    # In a text of another encoding hardly any two bytes make a letter of UTF-8; in a damaged one most do.
    return LEGACY if wrong > letters else "utf-8"


def _count_letters(head: bytes, raw: IO[bytes]) -> tuple[int, int]:
    """Letters beyond ASCII that are sound UTF-8, and bytes that are not."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape")
    letters = wrong = 0
    block = head
    while True:
        text = decoder.decode(block, final=not block)
        if not text.isascii():
            bad = sum(1 for sign in text if "\udc80" <= sign <= "\udcff")
            wrong += bad
            letters += sum(1 for sign in text if sign > "\x7f") - bad
        if not block:
            return letters, wrong
        block = raw.read(_BLOCK)


def read_separated_values(path: Path, reading: Reading, usual: str) -> Iterator[list[str]]:
    """Yield the values of each row of a separated file, the header first.

    Args:
        usual: the separator that the file's suffix stands for.

    Raises:
        DataError: what was opened is no text of the encoding.
    """
    separator = reading.separator or _separator_of(path, reading, usual)
    if separator != usual and reading.separator is None:
        reading.note(f"{path}: values are separated by {_NAMES[separator]}; if not, set data.separator")
    quoting = reading.quoting or ("csv" if reading.hides_rows else _quoting_of(path, reading, separator))
    with open_text(path, reading) as text:
        if quoting == "none":
            yield from csv.reader(text, delimiter=separator, quoting=csv.QUOTE_NONE)
        else:
            yield from csv.reader(text, delimiter=separator, strict=True)


def _separator_of(path: Path, reading: Reading, usual: str) -> str:
    """The separator by which the first rows have as many values as the header, the usual one if it does."""
    with open_text(path, reading) as text:
        most = 1 if reading.hides_rows else _SAMPLE_LINES
        lines = [line for _, line in zip(range(most), text, strict=False)]
    widths = {separator: _width(lines, separator) for separator in (usual, *SEPARATORS)}
    if widths[usual] > 1:
        return usual
    return max(widths, key=lambda separator: (widths[separator], separator == usual))


def _width(lines: Sequence[str], separator: str) -> int:
    """Values per row, if all whole rows have the header's number; else 1."""
    try:
        rows = [row for row in csv.reader(lines, delimiter=separator) if row]
    except csv.Error:
        return 1
    whole = rows[:-1] if len(lines) == _SAMPLE_LINES else rows  # the last may go on behind the sample
    return len(rows[0]) if rows and all(len(row) == len(rows[0]) for row in whole) else 1


def _quoting_of(path: Path, reading: Reading, separator: str) -> Quoting:
    """Whether quotation marks are signs like others, or stand around values.

    In tab-separated files they are signs if every line by itself has the header's number of values and one
    has marks that stand around no value. Elsewhere they stand around values, as is usual there; where the
    same would speak for signs, so that rows may be glued together, it is said.
    """
    quoted = odd = False
    width = 0
    with open_text(path, reading) as text:
        for line in text:
            values = line.rstrip("\r\n").split(separator)
            width = width or len(values)
            if '"' in line:
                quoted = True
                odd = odd or any('"' in value and not _QUOTED.fullmatch(value) for value in values)
            if len(values) != width and line.strip():
                return "csv"
    if odd and separator != "\t":
        reading.note(
            f"{path}: quotation marks that stand around no value of their line may glue rows; if they"
            " are signs, set data.quoting"
        )
        return "csv"
    if odd:
        reading.note(
            f"{path}: quotation marks are read as they are; if they stand around values, set data.quoting"
        )
        return "none"
    if quoted and separator == "\t":
        reading.note(
            f"{path}: quotation marks around values are taken off; if they belong to them, set data.quoting"
        )
    return "csv"


def suffix_of(path: Path) -> str:
    """Return the suffix that tells a file's format, in lower case: of `a.jsonl.gz` it is `.jsonl`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in PACKED else suffixes[-1] if suffixes else ""


def stem_of(path: Path) -> str:
    """Return a file's name without the suffixes of format and packing."""
    name = path.name.removesuffix(path.suffix) if path.suffix.lower() in PACKED else path.name
    return Path(name).stem


def describe_suffixes(suffixes: Sequence[str]) -> str:
    """The suffixes that are read, as messages list them."""
    return f"{list_names(suffixes)} (also packed: {list_names(PACKED)})"
