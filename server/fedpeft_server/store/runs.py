"""The runs of a daemon: what was submitted, how it stands, and what it said."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from sqlalchemy import Connection, Row, func, select

from fedpeft.config import RunConfig
from fedpeft.errors import StateError, UsageError
from fedpeft.faults import crash_point
from fedpeft.flower.roster import Roster
from fedpeft.runfile import run_digest, run_from_json, run_json
from fedpeft_server.metrics import RunGauges
from fedpeft_server.store.database import Database
from fedpeft_server.store.schema import budget, checkpoints, lines, refusals, rounds, runs

_ROSTER = TypeAdapter(Roster)


class Status(StrEnum):
    """How a run stands."""

    QUEUED = "queued"
    WAITING = "waiting-for-agents"
    RUNNING = "running"
    PAUSED = "paused"  # something outside the run is in the way; it is tried again
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def final(self) -> bool:
        """Nothing more will happen."""
        return self in (Status.FINISHED, Status.FAILED, Status.STOPPED)


class Rules(BaseModel):
    """Which agents a run may ask, and for how many it waits before its first round."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_agents: int = Field(default=0, ge=0)  # 0: as many as the run file's partitioner has clients
    agents: tuple[str, ...] = ()  # these only; empty: all
    wait_s: float = Field(default=0.0, ge=0.0)  # then the run fails; 0: as long as it takes


@dataclass(frozen=True)
class StoredRun:
    """A submitted run as the store has it."""

    id: str
    place: int
    run: RunConfig
    digest: str
    rules: Rules
    status: Status
    reason: str
    submitter: str
    submitted_at: float
    changed_at: float
    round: int  # last committed; -1 before the start is
    adapter_digest: str


@dataclass(frozen=True)
class Line:
    """One line of a run's log: a row of `metrics.jsonl`, or an event with `event` and `text`."""

    number: int
    at: float
    text: str


class Runs:
    """Runs in the order of their submission; every change is durable when a method returns.

    Raises:
        StorageError: from every method, when the database cannot be used.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def submit(self, run: RunConfig, rules: Rules, *, submission: str, submitter: str) -> StoredRun:
        """Queue a run; the same submission again is the same run.

        Raises:
            UsageError: the submission's name was used for another run.
        """
        digest = run_digest(run)
        with self._database.writing() as connection:
            known = connection.execute(select(runs).where(runs.c.submission == submission)).first()
            if known is not None:
                if known.digest != digest:
                    raise UsageError(
                        f"submission {submission!r} came before with another run file; give it another name"
                    )
                return _stored(connection, known)
            place = int(connection.execute(select(func.coalesce(func.max(runs.c.place), 0))).scalar_one()) + 1
            now = time.time()
            connection.execute(
                runs.insert().values(
                    id=f"{run.run.name}-{place}",
                    place=place,
                    name=run.run.name,
                    digest=digest,
                    run_json=run_json(run),
                    status=Status.QUEUED,
                    reason="",
                    submitter=submitter,
                    submitted_at=now,
                    changed_at=now,
                    submission=submission,
                    rules=rules.model_dump_json(),
                    adapter_digest="",
                )
            )
            crash_point("server.submit.inserted")
            row = connection.execute(select(runs).where(runs.c.place == place)).one()
            stored = _stored(connection, row)
        crash_point("server.submit.committed")
        return stored

    def get(self, run_id: str) -> StoredRun:
        """One run.

        Raises:
            UsageError: there is none of that id.
        """
        with self._database.reading() as connection:
            row = connection.execute(select(runs).where(runs.c.id == run_id)).first()
            if row is None:
                raise UsageError(f"there is no run {run_id!r}; fedpeft run list names them")
            return _stored(connection, row)

    def list(self) -> Sequence[StoredRun]:
        """All runs, the oldest first."""
        with self._database.reading() as connection:
            return [
                _stored(connection, row) for row in connection.execute(select(runs).order_by(runs.c.place))
            ]

    def set_status(self, run_id: str, status: Status, reason: str = "") -> None:
        """Say how a run stands, and why; the change is also a line of its log."""
        reason = reason.replace("\x00", " ")  # no text of PostgreSQL holds one, and an agent's words may
        with self._database.writing() as connection:
            stands = select(runs.c.status, runs.c.reason).where(runs.c.id == run_id)
            if tuple(connection.execute(stands).one()) == (status, reason):
                return
            changed = {"status": status, "reason": reason, "changed_at": time.time()}
            connection.execute(runs.update().where(runs.c.id == run_id).values(changed))
            add_line(connection, run_id, _event("status", status=status, reason=reason))
            crash_point("server.status.written")
        crash_point("server.status.committed")

    def finish(self, run_id: str, adapter_digest: str) -> None:
        """The run's folder is complete."""
        with self._database.writing() as connection:
            changed = {
                "status": Status.FINISHED,
                "reason": "",
                "changed_at": time.time(),
                "adapter_digest": adapter_digest,
            }
            connection.execute(runs.update().where(runs.c.id == run_id).values(changed))
            add_line(connection, run_id, _event("status", status=Status.FINISHED, reason=""))
            crash_point("server.finish.written")
        crash_point("server.finish.committed")

    def say(self, run_id: str, text: str) -> None:
        """Add a line of JSON to the run's log."""
        with self._database.writing() as connection:
            add_line(connection, run_id, text)

    def lines(self, run_id: str, *, after: int = 0, limit: int = 1000) -> Sequence[Line]:
        """Lines of the log with a higher number than `after`."""
        wanted = (
            select(lines)
            .where(lines.c.run == run_id, lines.c.number > after)
            .order_by(lines.c.number)
            .limit(limit)
        )
        with self._database.reading() as connection:
            return [Line(row.number, row.at, row.text) for row in connection.execute(wanted)]

    def roster(self, run_id: str) -> Roster | None:
        """Who answered the roll call; None before it."""
        with self._database.reading() as connection:
            text = connection.execute(select(runs.c.roster).where(runs.c.id == run_id)).scalar_one()
        return None if text is None else _ROSTER.validate_json(text)

    def keep_roster(self, run_id: str, roster: Roster) -> Roster:
        """Make the roll call's outcome, or a larger roster, the run's for good; nobody leaves it again.

        Returns:
            The one that is kept: that of before, if it isn't a part of this one.
        """
        with self._database.writing() as connection:
            text = connection.execute(select(runs.c.roster).where(runs.c.id == run_id)).scalar_one()
            kept = None if text is None else _ROSTER.validate_json(text)
            if kept is not None and not kept.members.items() <= roster.members.items():
                return kept
            text = _ROSTER.dump_json(roster).decode()
            connection.execute(runs.update().where(runs.c.id == run_id).values(roster=text))
            crash_point("server.roster.written")
        crash_point("server.roster.committed")
        return roster

    def refusals(self, run_id: str) -> dict[str, int]:
        """How many results were refused, by reason."""
        wanted = select(refusals.c.reason, refusals.c.count).where(refusals.c.run == run_id)
        with self._database.reading() as connection:
            return {str(reason): int(count) for reason, count in connection.execute(wanted)}

    def gauges(self, newest: int) -> tuple[Mapping[str, int], Sequence[RunGauges]]:
        """How many runs stand how, and the last committed round and spent epsilon of the newest ones."""
        counted = select(runs.c.status, func.count()).group_by(runs.c.status)
        listed = select(runs.c.id).order_by(runs.c.place.desc()).limit(newest)
        with self._database.reading() as connection:
            standing = {str(status): int(count) for status, count in connection.execute(counted)}
            names = list(connection.execute(listed).scalars())
            last = select(checkpoints.c.run, func.max(checkpoints.c.round)).where(
                checkpoints.c.run.in_(names)
            )
            grouped = connection.execute(last.group_by(checkpoints.c.run))
            reached: dict[str, int] = {str(run): int(round_) for run, round_ in grouped}
            private = connection.execute(select(budget.c.run).where(budget.c.run.in_(names))).scalars()
            spent = {run: _epsilon(connection, run, reached.get(run)) for run in private}
        return standing, [RunGauges(run, reached.get(run, 0), spent.get(run)) for run in names]


def _epsilon(connection: Connection, run_id: str, round_: int | None) -> float | None:
    """What a private run had spent after its last committed round."""
    wanted = select(rounds.c.row).where(rounds.c.run == run_id, rounds.c.number == round_)
    text = connection.execute(wanted).scalar_one_or_none()
    stated = json.loads(text).get("epsilon") if text else None
    return None if stated is None else float(stated)  # infinities are written as text


def add_line(connection: Connection, run_id: str, text: str) -> None:
    """One more line of a run's log, in the caller's transaction."""
    # Databases with several writers number lines one after the other; SQLite has one writer anyway.
    connection.execute(select(runs.c.id).where(runs.c.id == run_id).with_for_update())
    last = select(func.coalesce(func.max(lines.c.number), 0)).where(lines.c.run == run_id)
    number = int(connection.execute(last).scalar_one()) + 1
    connection.execute(lines.insert().values(run=run_id, number=number, at=time.time(), text=text))


def _event(kind: str, **fields: str) -> str:
    return json.dumps({"event": kind, **fields})


def _stored(connection: Connection, row: Row[Any]) -> StoredRun:
    last = select(func.max(checkpoints.c.round)).where(checkpoints.c.run == row.id)
    round_ = connection.execute(last).scalar_one()
    try:
        status = Status(row.status)
    except ValueError as error:
        raise StateError(f"run {row.id} has the unknown status {row.status!r}; restore a backup") from error
    return StoredRun(
        id=row.id,
        place=row.place,
        run=run_from_json(row.run_json),
        digest=row.digest,
        rules=Rules.model_validate_json(row.rules),
        status=status,
        reason=row.reason,
        submitter=row.submitter,
        submitted_at=row.submitted_at,
        changed_at=row.changed_at,
        round=-1 if round_ is None else int(round_),
        adapter_digest=row.adapter_digest,
    )
