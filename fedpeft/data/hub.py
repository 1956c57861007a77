"""Data sets of the hub by owner and name, through the `datasets` library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from fedpeft.data.columns import BATCH_ROWS, NumberedRow, class_names, name_classes
from fedpeft.errors import DataError

PREFIX = "datasets:"
DEFAULT_SPLIT = "train"

_HUB = "hf://datasets/"  # by this the library looks at the hub and its cache, never at a folder of that name
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LONGEST = 96  # characters of a segment, as the hub has it


def read_hub(source: str) -> Iterator[NumberedRow]:
    """The rows of ``datasets:OWNER/NAME[/CONFIG][:SPLIT]``; the split defaults to train.

    Raises:
        DataError: no such data set, configuration or split, or it is neither cached nor reachable.
    """
    name, config, split = parse_hub_source(source)
    number = 0
    try:
        loaded = _load(name, config, split)
        classes = class_names(loaded.features.to_dict())
        for batch in loaded.iter(batch_size=BATCH_ROWS):
            columns = list(batch)
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield number, name_classes(dict(zip(columns, values, strict=True)), classes)
    except Exception as error:  # the library's errors share no base class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source}: cannot be loaded ({type(error).__name__}: {reason}); check owner, name, configuration"
            " and split, and that it is cached or the hub can be reached"
        ) from error


def parse_hub_source(source: str) -> tuple[str, str | None, str]:
    """Owner and name, configuration and split of ``datasets:OWNER/NAME[/CONFIG][:SPLIT]``.

    The library also takes names of its own loaders ("pandas", which unpickles files below the working folder)
    and folders; neither is a data set of the hub, and both are refused here.

    Raises:
        DataError: it has not two or three segments, or one of them is no name.
    """
    name, _, split = source.removeprefix(PREFIX).partition(":")
    segments = name.split("/")
    sound = all(len(part) <= _LONGEST and _SEGMENT.fullmatch(part) for part in segments)
    if not sound or len(segments) not in (2, 3):
        raise DataError(
            f"'{source}' names no data set of the hub; write {PREFIX}OWNER/NAME[/CONFIG][:SPLIT], or the path"
            " of a file"
        )
    config = segments[2] if len(segments) == 3 else None
    return "/".join(segments[:2]), config, split or DEFAULT_SPLIT


def _load(name: str, config: str | None, split: str) -> Any:
    import datasets  # costs more than a second to import, and most runs need none of it

    shown_bars = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(f"{_HUB}{name}", config, split=split)
    finally:
        if shown_bars:
            datasets.enable_progress_bars()
