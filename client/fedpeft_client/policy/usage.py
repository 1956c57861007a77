"""What an agent did, durably: what caps on bytes are compared with and what `status` shows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from fedpeft.errors import StateError
from fedpeft.runtime.files import storage, write_atomically

VERSION = 2
_KEPT_RUNS = 1000  # a server names as many as it likes, and each is a line of the status


class RunUsage(BaseModel):
    """One run; what it costs in privacy is in the ledger.

    Attributes:
        digest: of its run file.
        rows: fingerprint of the rows that its roll call was answered with; empty before.
        trained: whether a round of it was begun: its rows are settled then.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    digest: str = ""
    rounds: int = 0
    last_round: int = 0
    rows: str = ""
    trained: bool = False


class Usage(BaseModel):
    """All that is counted.

    Attributes:
        day: UTC day that `bytes_today` belongs to.
        runs: by the server's name for the run and the digest of its run file, see `run_key`.
        promised_epsilon: sum of what runs promised before there was a ledger of what they cost.
        ledger_lines: of the privacy ledger, as far as this file knows.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = VERSION
    day: str = ""
    bytes_today: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    results: int = 0
    refusals: int = 0
    failures: int = 0
    runs: dict[str, RunUsage] = {}
    promised_epsilon: float = 0.0
    ledger_lines: int = 0


class UsageBook:
    """The file of it, rewritten at every change.

    Raises:
        StateError: the file is corrupt; what was spent is then unknown.
        StorageError: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.usage = _read(path)

    def count_bytes(self, day: str, *, up: int = 0, down: int = 0) -> None:
        """Count bytes; not durable before `save`."""
        if self.usage.day != day:
            self.usage.day, self.usage.bytes_today = day, 0
        self.usage.bytes_today += up + down
        self.usage.bytes_up += up
        self.usage.bytes_down += down

    def today(self, day: str) -> int:
        """Bytes moved on that day."""
        return self.usage.bytes_today if self.usage.day == day else 0

    def add_run(self, key: str, name: str, digest: str) -> None:
        """Count a run from now on; of very many, those go that were added longest ago."""
        runs = self.usage.runs
        runs.setdefault(key, RunUsage(name=name, digest=digest))
        while len(runs) > _KEPT_RUNS:
            untrained = (old for old, run in runs.items() if not run.trained and old != key)
            del runs[next(untrained, next(iter(runs)))]

    def save(self) -> None:
        """Make it durable."""
        write_atomically(self._path, self.usage.model_dump_json(indent=1).encode(), mode=0o600)


def _read(path: Path) -> Usage:
    if not path.exists():
        return Usage()
    with storage(path):
        content = path.read_bytes()
    try:
        return Usage.model_validate(_current(json.loads(content)))
    except (ValidationError, ValueError, AttributeError, TypeError) as error:
        raise StateError(
            f"{path} is corrupt, and what this agent has spent with it; restore or delete it"
        ) from error


def _current(table: dict[str, Any]) -> dict[str, Any]:
    """Return a file's table as this version has it; version 1 booked what each run promised."""
    if table.get("version") != 1:
        return table
    runs = table.pop("runs", {})
    promised = sum(run.pop("epsilon", None) or 0.0 for run in runs.values())
    for run in runs.values():
        run.pop("kind", None)
        run["trained"] = bool(run.get("last_round"))
    return {**table, "version": VERSION, "runs": runs, "promised_epsilon": promised}


def run_key(run: str, digest: str) -> str:
    """Return the key of a run; a server's name for it may hold anything, and stand for several files."""
    return hashlib.sha256(f"{digest} {run}".encode()).hexdigest()[:32]
