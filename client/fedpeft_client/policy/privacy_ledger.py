"""What private runs cost this device's rows: an append-only file, written before anything is trained.

Each line is one JSON object, flushed to the disk before the agent goes on. A *charge* says which round of
which run is paid for, and by which event; an *answer* says that the round's one result exists; a *failure*
that the server was told of one. Runs are told apart by the digest of their run file, whatever a server calls
them. A line that a crash cut short was never acted on, and is dropped at the next start; anything else that
cannot be read is an error, and never taken for an empty ledger.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedpeft.errors import StateError
from fedpeft.runtime.crash_points import crash_point
from fedpeft.runtime.files import storage, sync_folder

VERSION = 1


@dataclass(frozen=True)
class Costs:
    """What a run costs with one more round, by this device's own accountant.

    Attributes:
        event: what one round releases, as `fedpeft.privacy.events.event_to_plain` writes it.
        count: how many such events are charged now: all rounds of a run whose account is the federation's, at
            its first; else one.
        epsilon: of all the run's events at the owner's delta.
        promised_epsilon: the same at the run file's own delta, which its `max_epsilon` bounds.
        total_epsilon: of all runs at the owner's delta.
    """

    event: Mapping[str, Any]
    count: int
    epsilon: float
    promised_epsilon: float
    total_epsilon: float


@dataclass(frozen=True)
class RunAccount:
    """One run's account.

    Attributes:
        run: the server's name for the run that the first charge was made for.
        name: the run's own.
        event: see `Costs`.
        count: events that are paid for.
        round: the last one that is paid for.
        answered: the last round with a result; it equals `round` once that round has one.
        failures: of the last round, that the server was told of.
        epsilon: of this run at the owner's delta, when it was last charged.
    """

    run: str
    name: str
    event: Mapping[str, Any]
    count: int = 0
    round: int = 0
    answered: int = 0
    failures: int = 0
    epsilon: float = 0.0

    @property
    def kind(self) -> str:
        """The kind of privacy that the run's events are about."""
        return str(self.event["kind"])


@dataclass
class PrivacyLedger:
    """The accounts of all private runs, by the digest of their run file.

    Attributes:
        lines: that the file holds; they are never fewer than before.
        total_epsilon: of all runs at the owner's delta, when one was last charged.

    Args:
        path: of the file; its folder is there.
        at_least: lines that the file is known to have had; fewer mean that it was lost or replaced.

    Raises:
        StateError: the file is damaged, or older than what is known of it.
        StorageError: it cannot be read or written.
    """

    path: Path
    at_least: int = 0
    runs: dict[str, RunAccount] = field(default_factory=dict)
    lines: int = 0
    total_epsilon: float = 0.0

    def __post_init__(self) -> None:
        with storage(self.path):
            content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for line in whole.splitlines():
            self._apply(self._parse(line))
        if self.lines < self.at_least:
            raise StateError(
                f"{self.path} holds {self.lines} lines and this agent wrote {self.at_least}; restore the"
                " newest copy, since what was spent on these rows is unknown without it"
            )
        with storage(self.path):
            if len(whole) != len(content):
                os.truncate(self.path, len(whole))

    def charge(self, digest: str, round_: int, costs: Costs, *, run: str, name: str) -> None:
        """Pay for a round, durably; call it before anything is trained.

        Raises:
            StorageError: the line cannot be written; nothing is charged, and nothing may be trained.
        """
        crash_point("agent.privacy.begun")
        self._append(
            {
                "charge": digest,
                "run": run,
                "name": name,
                "round": round_,
                "event": dict(costs.event),
                "count": costs.count,
                "epsilon": costs.epsilon,
                "total": costs.total_epsilon,
            }
        )
        crash_point("agent.privacy.charged")

    def answer(self, digest: str, round_: int) -> None:
        """Note, durably, that the round has its one result; raises as `charge`."""
        self._append({"answer": digest, "round": round_})
        crash_point("agent.privacy.answered")

    def fail(self, digest: str, round_: int) -> None:
        """Note, durably, that the server is told of a failure in the round; raises as `charge`."""
        self._append({"failure": digest, "round": round_})

    def events(self) -> list[tuple[str, Mapping[str, Any], int]]:
        """Return all that was paid for, as (digest, event, count)."""
        return [(digest, account.event, account.count) for digest, account in self.runs.items()]

    def _append(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, allow_nan=False, sort_keys=True)
        fresh = not self.path.exists()
        with storage(self.path):
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                if fresh:
                    _write(file, json.dumps({"version": VERSION}) + "\n")
                before = os.fstat(file).st_size
                try:
                    _write(file, text + "\n")
                    os.fsync(file)
                except OSError:
                    os.ftruncate(file, before)  # a full disk leaves no half line for the next one to follow
                    raise
            finally:
                os.close(file)
            if fresh:
                sync_folder(self.path.parent)
        self._apply(line)

    def _parse(self, line: bytes) -> Mapping[str, Any]:
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise self._damage_error(str(error)) from error

    def _apply(self, line: Mapping[str, Any]) -> None:
        """Take one line into the accounts."""
        try:
            if "version" in line:
                if line["version"] != VERSION:
                    raise self._damage_error(f"it has version {line['version']!r}, known is {VERSION}")
                return
            self.lines += 1
            if "charge" in line:
                self._apply_charge(str(line["charge"]), line)
            elif "answer" in line:
                digest = str(line["answer"])
                self.runs[digest] = replace(self.runs[digest], answered=int(line["round"]))
            else:
                digest = str(line["failure"])
                self.runs[digest] = replace(self.runs[digest], failures=self.runs[digest].failures + 1)
        except (KeyError, ValueError, TypeError) as error:
            raise self._damage_error(repr(error)) from error

    def _apply_charge(self, digest: str, line: Mapping[str, Any]) -> None:
        before = self.runs.get(digest) or RunAccount(str(line["run"]), str(line["name"]), dict(line["event"]))
        self.total_epsilon = float(line["total"])
        self.runs[digest] = replace(
            before,
            count=before.count + int(line["count"]),
            round=int(line["round"]),
            failures=0,
            epsilon=float(line["epsilon"]),
        )

    def _damage_error(self, why: str) -> StateError:
        return StateError(
            f"{self.path} cannot be read ({why}); restore the newest copy, since what was spent on these"
            " rows is unknown without it"
        )


def _write(file: int, text: str) -> None:
    """Write all of it; a short write is followed by another, which says what is wrong."""
    left = text.encode()
    while left:
        left = left[os.write(file, left) :]
