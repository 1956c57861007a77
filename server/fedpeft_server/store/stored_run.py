"""A run as the store has it."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import Connection, Row, func, select

from fedpeft.config.run_file import run_from_json
from fedpeft.config.sections import RunConfig
from fedpeft.errors import RunFileError, StateError, UsageError
from fedpeft_server.store.schema import checkpoints, run_readers, runs

EVERYONE = "*"  # as a reader: all submitters


class RunStatus(StrEnum):
    """How a run stands."""

    QUEUED = "queued"
    WAITING = "waiting-for-agents"
    RUNNING = "running"
    PAUSED = "paused"  # something outside the run is in the way; it is tried again
    STOPPING = "stopping"  # a person's stop is durable, and what has to end is ending
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def final(self) -> bool:
        """Nothing more will happen."""
        return self in (RunStatus.FINISHED, RunStatus.FAILED, RunStatus.STOPPED)

    def may_become(self, other: RunStatus) -> bool:
        """Whether a run that stands so may come to stand otherwise: ends are for good, and so is a stop."""
        return other.final if self is RunStatus.STOPPING else not self.final


UNENDED = tuple(status for status in RunStatus if not status.final)


class Rules(BaseModel):
    """Which agents a run may ask, and for how many it waits before its first round."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_agents: int = Field(default=0, ge=0)  # 0: as many as the run file's partitioner has clients
    agents: tuple[str, ...] = ()  # these only; empty: all
    wait_s: float = Field(default=0.0, ge=0.0)  # then the run fails; 0: as long as it takes


@dataclass(frozen=True)
class StoredRun:
    """A submitted run as the store has it.

    One that was stored by another version may be none that this version can read; it is there all the same,
    with its `problem`, so that the others go on and people can see and stop it.

    Attributes:
        place: in the order of submission, from 1.
        name: the run file's own.
        text: of the run file; see `fedpeft.config.run_file.run_json`.
        submitter: whose run it is, by certificate.
        round: last committed; -1 before the start is.
        readers: submitters who may read it too; `EVERYONE`: all of them.
        fault: what else of the row this version cannot read; empty: nothing.
    """

    id: str
    place: int
    name: str
    text: str
    digest: str
    rules: Rules
    status: RunStatus
    reason: str
    submitter: str
    submitted_at: float
    changed_at: float
    round: int
    adapter_digest: str
    readers: tuple[str, ...] = ()
    fault: str = ""

    @functools.cached_property
    def run(self) -> RunConfig:
        """The run file.

        Raises:
            StateError: this version cannot read it.
        """
        try:
            return run_from_json(self.text)
        except RunFileError as error:
            raise StateError(
                f"this version cannot read run {self.id} ({' '.join(str(error).split())[:500]}); go on with"
                " it in the version that it was submitted to, or stop it and submit it anew"
            ) from error

    @functools.cached_property
    def problem(self) -> str:
        """Why this version cannot go on with the run; empty: it can."""
        if self.fault:
            return self.fault
        try:
            _ = self.run
        except StateError as error:
            return str(error)
        return ""


def read_runs(connection: Connection, found: Sequence[Row[Any]]) -> list[StoredRun]:
    """Complete rows of the table `runs`, with two questions for all of them."""
    ids = [row.id for row in found]
    last = select(checkpoints.c.run, func.max(checkpoints.c.round)).where(checkpoints.c.run.in_(ids))
    wanted = select(run_readers).where(run_readers.c.run.in_(ids)).order_by(run_readers.c.reader)
    reached: dict[str, int] = {}
    named: dict[str, list[str]] = {}
    if ids:
        reached = {run: int(number) for run, number in connection.execute(last.group_by(checkpoints.c.run))}
        for run, reader in connection.execute(wanted):
            named.setdefault(run, []).append(reader)
    return [_run_of(row, reached.get(row.id, -1), named.get(row.id, ())) for row in found]


def _run_of(row: Row[Any], round_: int, readers: Collection[str]) -> StoredRun:
    status, rules, fault = RunStatus.FAILED, Rules(), ""
    try:
        status, rules = RunStatus(row.status), Rules.model_validate_json(row.rules)
    except ValidationError:
        status, fault = RunStatus(row.status), f"this version cannot read the rules of run {row.id}"
    except ValueError:
        fault = f"this version does not know the status {row.status!r} of run {row.id}"
    return StoredRun(
        id=row.id,
        place=row.place,
        name=row.name,
        text=row.run_json,
        digest=row.digest,
        rules=rules,
        status=status,
        reason=row.reason,
        submitter=row.submitter,
        submitted_at=row.submitted_at,
        changed_at=row.changed_at,
        round=round_,
        adapter_digest=row.adapter_digest,
        readers=tuple(readers),
        fault=fault,
    )


def read_run(connection: Connection, run_id: str) -> StoredRun:
    """Read one run.

    Raises:
        UsageError: there is none of that id.
    """
    found = read_runs(connection, connection.execute(select(runs).where(runs.c.id == run_id)).all())
    if not found:
        raise no_such_run(run_id)
    return found[0]


def no_such_run(run_id: str) -> UsageError:
    """Return what is said of a run that isn't there, or that the caller may not read."""
    return UsageError(f"there is no run {run_id[:120]!r}; fedpeft run list names them")
