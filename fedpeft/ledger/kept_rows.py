"""What a run folder remembers of its run's rows: which they were, and where they lie now."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedpeft.config.sections import DataSection, RunConfig
from fedpeft.errors import StateError
from fedpeft.runtime.files import storage, write_atomically

KEPT_ROWS = "rows-read.json"


@dataclass(frozen=True)
class KeptRows:
    """The rows of a run, as its folder remembers them.

    Attributes:
        digest: of the rows that the run began with (`fedpeft.data.row_digest`); "" before they were read. It
            confirms a guess of all rows, so it stays in the folder and nobody pulls it.
        train, test: where they lie now, if they have moved since the run began; None: where the run says.
    """

    digest: str = ""
    train: str | None = None
    test: str | None = None

    def relocate(self, train: str | None, test: str | None) -> KeptRows:
        """Return the same rows at other places; None: where they are known to lie."""
        return replace(self, train=_absolute(train) or self.train, test=_absolute(test) or self.test)

    def section(self, run: RunConfig) -> DataSection:
        """Return the run's data section with the places where its rows lie now."""
        moved = {"train": self.train, "test": self.test}
        return run.data.model_copy(update={key: place for key, place in moved.items() if place is not None})

    def write(self, folder: Path) -> None:
        """Write them into a run's folder.

        Raises:
            StorageError: they cannot be written.
        """
        known = {key: value for key, value in asdict(self).items() if value}
        write_atomically(folder / KEPT_ROWS, json.dumps(known, sort_keys=True).encode() + b"\n")


def read_kept_rows(folder: Path) -> KeptRows:
    """Read what a run's folder remembers of its rows, which is nothing before they were read.

    Raises:
        StateError: the file is damaged.
        StorageError: it cannot be read.
    """
    path = folder / KEPT_ROWS
    if not path.exists():
        return KeptRows()
    with storage(path):
        content = path.read_bytes()
    try:
        found: dict[str, Any] = json.loads(content)
        return KeptRows(**{key: str(found[key]) for key in ("digest", "train", "test") if found.get(key)})
    except (ValueError, TypeError, AttributeError) as error:
        raise StateError(f"{path} is damaged; restore it, or start anew with another --out") from error


def _absolute(place: str | None) -> str | None:
    if place is None or not Path(place).expanduser().exists():
        return place
    return str(Path(place).expanduser().absolute())
