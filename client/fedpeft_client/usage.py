"""What an agent did and has spent, durably: what caps are compared with and what `status` shows."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from fedpeft.errors import StateError
from fedpeft.files import storage, write_atomically


class RunUsage(BaseModel):
    """One run.

    Attributes:
        epsilon: what the run may spend at most, by its promise; None: it promises no privacy.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    kind: str = ""
    epsilon: float | None = None
    rounds: int = 0
    last_round: int = 0


class Usage(BaseModel):
    """All that is counted.

    Attributes:
        day: UTC day that `bytes_today` belongs to.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = 1
    day: str = ""
    bytes_today: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    results: int = 0
    refusals: int = 0
    failures: int = 0
    runs: dict[str, RunUsage] = {}

    @property
    def epsilon(self) -> float:
        """What all runs together may spend (basic composition)."""
        return sum(run.epsilon or 0.0 for run in self.runs.values())


class UsageBook:
    """The file of it, rewritten at every change.

    Raises:
        StateError: the file is corrupt; what was spent is then unknown.
        StorageError: it cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.usage = _read(path)

    def moved(self, day: str, *, up: int = 0, down: int = 0) -> None:
        """Count bytes; not durable before `save`."""
        if self.usage.day != day:
            self.usage.day, self.usage.bytes_today = day, 0
        self.usage.bytes_today += up + down
        self.usage.bytes_up += up
        self.usage.bytes_down += down

    def today(self, day: str) -> int:
        """Bytes moved on that day."""
        return self.usage.bytes_today if self.usage.day == day else 0

    def save(self) -> None:
        """Make it durable."""
        write_atomically(self._path, self.usage.model_dump_json(indent=1).encode(), mode=0o600)


def _read(path: Path) -> Usage:
    if not path.exists():
        return Usage()
    with storage(path):
        content = path.read_bytes()
    try:
        return Usage.model_validate_json(content)
    except ValidationError as error:
        raise StateError(
            f"{path} is corrupt, and what this agent has spent with it; restore or delete it"
        ) from error
