"""Data sets by name, through the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedpeft.data.readers import BATCH_ROWS, NumberedRow
from fedpeft.errors import DataError

PREFIX = "datasets:"
DEFAULT_SPLIT = "train"


def read_hub(source: str) -> Iterator[NumberedRow]:
    """The rows of ``datasets:NAME[/CONFIG][:SPLIT]``; the split defaults to train.

    Two segments are first taken as owner and name, then as name and configuration; three as owner, name and
    configuration. NAME may also be a folder that the library can load.

    Raises:
        DataError: no such data set, configuration or split, or it is neither cached nor reachable.
    """
    name, config, split = parse_hub_source(source)
    number = 0
    try:
        for batch in _load(name, config, split).iter(batch_size=BATCH_ROWS):
            columns = list(batch)
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield number, dict(zip(columns, values, strict=True))
    except Exception as error:  # the library's errors share no base class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source}: cannot be loaded ({type(error).__name__}: {reason}); check name, configuration and "
            "split, and that it is cached or the hub can be reached"
        ) from error


def parse_hub_source(source: str) -> tuple[str, str | None, str]:
    """Name, configuration and split of ``datasets:NAME[/CONFIG][:SPLIT]``.

    Raises:
        DataError: the name is empty or has more than three segments.
    """
    name, _, split = source.removeprefix(PREFIX).partition(":")
    segments = name.split("/")
    if Path(name).is_dir() and name:
        return name, None, split or DEFAULT_SPLIT
    if not all(segments) or len(segments) > 3:
        raise DataError(f"'{source}' names no data set; write {PREFIX}NAME[/CONFIG][:SPLIT]")
    config = segments[2] if len(segments) == 3 else None
    return "/".join(segments[:2]), config, split or DEFAULT_SPLIT


def _load(name: str, config: str | None, split: str) -> Any:
    import datasets  # costs more than a second to import, and most runs need none of it

    shown_bars = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return _load_either(datasets, name, config, split)
    finally:
        if shown_bars:
            datasets.enable_progress_bars()


def _load_either(datasets: Any, name: str, config: str | None, split: str) -> Any:
    """Owner and name first; then, where there is no such data set, name and configuration."""
    try:
        return datasets.load_dataset(name, config, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        parent, _, last = name.rpartition("/")
        ambiguous = config is None and parent and not Path(name).is_dir()
        # Without a network a second try would only wait as long again, unless we are told to look no further
        # than the cache.
        unreachable = isinstance(error, ConnectionError) and not datasets.config.HF_HUB_OFFLINE
        if not ambiguous or unreachable:
            raise
        try:
            return datasets.load_dataset(parent, last, split=split)
        except (FileNotFoundError, ConnectionError):
            raise error from None
