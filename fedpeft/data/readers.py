"""Files and hub data sets as streams of rows; no reader holds a whole file.

JSON lines and CSV are read by the standard library: it gives the number of a bad row and leaves values as
they are written (a columnar reader turns text that looks like a date into one, and "007" into 7).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedpeft.errors import DataError

NumberedRow = tuple[int, Mapping[str, Any]]
"""A row's number, from 1, and its fields. JSON lines count as in an editor; CSV without its header."""

CSV_FIELD_LIMIT = 2**31 - 1
BATCH_ROWS = 1024


def read_jsonl(path: Path) -> Iterator[NumberedRow]:
    """One JSON object per line; blank lines are skipped but counted.

    Raises:
        DataError: a line is not a JSON object in UTF-8.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.strip().removeprefix(b"\xef\xbb\xbf")
            if not text:
                continue
            try:
                row = json.loads(text.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"{path}: row {number} is not JSON ({error}); needs one JSON object per line"
                ) from error
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}: row {number} is a JSON {type(row).__name__}; needs one JSON object per line"
                )
            yield number, row


def read_csv(path: Path) -> Iterator[NumberedRow]:
    """Comma-separated values with a header line; every value stays text.

    Raises:
        DataError: no header, a row with more or fewer values than it, or text that is not UTF-8.
    """
    return _read_separated(path, ",")


def read_tsv(path: Path) -> Iterator[NumberedRow]:
    """As `read_csv`, with tabs."""
    return _read_separated(path, "\t")


def _read_separated(path: Path, delimiter: str) -> Iterator[NumberedRow]:
    csv.field_size_limit(CSV_FIELD_LIMIT)  # the library's default of 128 KiB refuses long documents
    number = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(lines, None)
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
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: row {number + 1} cannot be read ({error}); needs UTF-8 text with a header"
            ) from error


def read_parquet(path: Path) -> Iterator[NumberedRow]:
    """A Parquet file, batch by batch.

    Raises:
        DataError: the file is no Parquet file or is damaged.
    """
    import pyarrow as pa  # costs a second to import, and most runs need none of it
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{path}: cannot be read as Parquet after row {number} ({reason}); write it anew"
        ) from error


READERS: Mapping[str, Callable[[Path], Iterator[NumberedRow]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".parquet": read_parquet,
}
"""The reader by a file's suffix, in lower case."""
