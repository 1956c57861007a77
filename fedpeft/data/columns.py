"""Files of columns, Parquet and Arrow, as rows; classes by the names that the file gives them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedpeft.data.text_files import Reading
from fedpeft.errors import DataError

NumberedRow = tuple[int, Mapping[str, Any]]
"""A row's number, from 1, and its fields. JSON lines count as in an editor; CSV without its header."""

BATCH_ROWS = 1024


class ClassName(str):
    """A class by its name, which knows its number in the file: run files may give either."""

    __slots__ = ("number",)
    number: int

    def __new__(cls, name: str, number: int) -> ClassName:
        """Make one."""
        made = super().__new__(cls, name)
        made.number = number
        return made


def name_classes(row: dict[str, Any], classes: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Return a row with the numbers of classes replaced by `ClassName`; -1, for no class, becomes None."""
    for column, names in classes.items():
        number = row.get(column)
        if isinstance(number, int) and 0 <= number < len(names):
            row[column] = ClassName(names[number], number)
        elif number == -1:
            row[column] = None
    return row


def class_names(features: Any) -> dict[str, tuple[str, ...]]:
    """Return the names of classes by column, from what the `datasets` library writes into a file's schema."""
    if not isinstance(features, dict):
        return {}
    return {
        str(column): tuple(map(str, kind["names"]))
        for column, kind in features.items()
        if isinstance(kind, dict)
        and kind.get("_type") == "ClassLabel"
        and isinstance(kind.get("names"), list)
    }


def read_parquet(path: Path, reading: Reading | None = None) -> Iterator[NumberedRow]:
    """A Parquet file, batch by batch.

    Raises:
        DataError: the file is no Parquet file, is damaged, or names a column twice.
    """
    import pyarrow as pa  # costs a second to import, and most runs need none of it
    import pyarrow.parquet as pq

    def batches() -> Iterator[Any]:
        with pq.ParquetFile(path) as file:
            yield file.schema_arrow
            yield from file.iter_batches(batch_size=BATCH_ROWS)

    yield from _rows(path, "Parquet", batches(), (pa.ArrowException, OSError))


def read_arrow(path: Path, reading: Reading | None = None) -> Iterator[NumberedRow]:
    """An Arrow file or stream, such as `datasets` saves, batch by batch.

    Raises:
        DataError: as `read_parquet`.
    """
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        with pa.memory_map(str(path)) as source:
            try:
                file = pa.ipc.open_file(source)
            except pa.ArrowInvalid:
                source.seek(0)
                stream = pa.ipc.open_stream(source)
                yield stream.schema
                yield from stream
                return
            yield file.schema
            yield from (file.get_batch(index) for index in range(file.num_record_batches))

    yield from _rows(path, "Arrow", batches(), (pa.ArrowException, OSError))


def _rows(
    path: Path, kind: str, batches: Iterator[Any], errors: tuple[type[Exception], ...]
) -> Iterator[NumberedRow]:
    number = 0
    try:
        schema = next(batches)
        classes = _classes_in(schema)
        twice = [name for name in schema.names if schema.names.count(name) > 1]
        if twice:
            raise DataError(f"{path}: the column '{twice[0]}' is there twice; rename one")
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, name_classes(row, classes)
    except errors as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path}: cannot be read as {kind} after row {number} ({reason}); write it anew"
        ) from error


def _classes_in(schema: Any) -> dict[str, tuple[str, ...]]:
    kept = (schema.metadata or {}).get(b"huggingface")
    try:
        return class_names(json.loads(kept)["info"]["features"]) if kept else {}
    except (ValueError, KeyError, TypeError):
        return {}


def find_saved_set(folder: Path, split: str) -> tuple[Path, list[Path]] | None:
    """Return the folder and the Arrow files of a data set that `datasets` saved; None if it saved none there.

    Args:
        split: which one of a folder of several.

    Raises:
        DataError: the folder has no such split, or its list of files cannot be read.
    """
    several = _json_in(folder / "dataset_dict.json")
    if several is not None:
        names = [str(name) for name in several.get("splits", ())]
        if split not in names:
            raise DataError(f"{folder} has no split '{split}'; name the folder of one of {', '.join(names)}")
        folder = folder / split
    state = _json_in(folder / "state.json")
    if state is None or "_data_files" not in state:
        return None
    return folder, [folder / Path(str(name)).name for name in _names(state["_data_files"], folder)]


def _names(entries: Any, folder: Path) -> Iterable[str]:
    try:
        return [str(entry["filename"]) for entry in entries]
    except (TypeError, KeyError) as error:
        raise DataError(f"{folder / 'state.json'} lists no files; save the data set anew") from error


def _json_in(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); save the data set anew") from error
    return found if isinstance(found, dict) else None
