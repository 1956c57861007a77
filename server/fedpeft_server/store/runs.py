"""The runs of a daemon: what was submitted, how it stands, and what it said."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Mapping, Sequence

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Connection, func, or_, select

from fedpeft.config.run_file import run_digest, run_json
from fedpeft.config.sections import RunConfig
from fedpeft.errors import StateError, UsageError
from fedpeft.runtime.crash_points import crash_point
from fedpeft.transport.roster import Roster
from fedpeft_server.server_metrics import RunGauges
from fedpeft_server.store.audit_log import Action, Actor, AuditLog
from fedpeft_server.store.database import Database
from fedpeft_server.store.run_log import Line, add_line, event_line, read_lines, say
from fedpeft_server.store.schema import (
    budget,
    checkpoints,
    refusals,
    rounds,
    run_readers,
    runs,
    updates,
)
from fedpeft_server.store.stored_run import (
    EVERYONE,
    UNENDED,
    Rules,
    RunStatus,
    StoredRun,
    read_run,
    read_runs,
)
from fedpeft_server.store.submitter_usage import Quota, check_quota, over_quota, set_kept

_ROSTER = TypeAdapter(Roster)


class Runs:
    """Runs in the order of their submission; every change is durable when a method returns.

    Raises:
        StorageError: from every method, when the database cannot be used.
    """

    def __init__(self, database: Database, audit: AuditLog) -> None:
        self._database, self._audit = database, audit

    def submit(
        self,
        run: RunConfig,
        rules: Rules,
        *,
        submission: str,
        submitter: str,
        role: str = "submitter",
        readers: Collection[str] = (),
        quota: Quota | None = None,
    ) -> StoredRun:
        """Queue a run; the same submission again is the same run.

        Its cost does not depend on how many runs there are.

        Args:
            submission: a name of the submitter's own for it; those of others are others.
            role: of the submitter, for the audit log.
            readers: who else may read the run.
            quota: None: there is no bound.

        Raises:
            UsageError: the submission's name was used for another run.
            LimitError: the submitter has its share of the server.
        """
        digest, key = run_digest(run), _submission_key(submitter, submission)
        with self._database.writing() as connection:
            known = _find_submitted(connection, key, digest, submission)
            if known is not None:
                return known
            if quota is not None:
                check_quota(connection, submitter, run, quota)
            place = int(connection.execute(select(func.coalesce(func.max(runs.c.place), 0))).scalar_one()) + 1
            run_id, now = f"{run.run.name}-{place}", time.time()
            connection.execute(
                runs.insert().values(
                    id=run_id,
                    place=place,
                    name=run.run.name,
                    digest=digest,
                    run_json=run_json(run),
                    status=RunStatus.QUEUED,
                    reason="",
                    submitter=submitter,
                    submitted_at=now,
                    changed_at=now,
                    submission=key,
                    rules=rules.model_dump_json(),
                    adapter_digest="",
                )
            )
            if readers:
                named = [{"run": run_id, "reader": reader} for reader in sorted(set(readers))]
                connection.execute(run_readers.insert(), named)
            shared = {"readers": ",".join(sorted(set(readers)))} if readers else {}
            entry = self._audit.add(
                connection, Actor(submitter, role), Action.SUBMITTED, run_id, digest=digest, **shared
            )
            crash_point("server.submit.inserted")
            stored = read_run(connection, run_id)
        crash_point("server.submit.committed")
        self._audit.publish(entry)
        return stored

    def find_submission(self, run: RunConfig, *, submission: str, submitter: str) -> StoredRun | None:
        """Return the run that a submission made before; raises as `submit`."""
        with self._database.reading() as connection:
            return _find_submitted(
                connection, _submission_key(submitter, submission), run_digest(run), submission
            )

    def check_quota(self, submitter: str, run: RunConfig, quota: Quota) -> None:
        """Refuse one more run of a submitter that has its share; raises LimitError."""
        with self._database.reading() as connection:
            check_quota(connection, submitter, run, quota)

    def over_quota(self, submitter: str, quota: Quota) -> str | None:
        """Say that a submitter's runs keep too many bytes; None: they don't."""
        with self._database.reading() as connection:
            return over_quota(connection, submitter, quota)

    def get(self, run_id: str) -> StoredRun:
        """One run.

        Raises:
            UsageError: there is none of that id.
        """
        with self._database.reading() as connection:
            return read_run(connection, run_id)

    def list(self, *, reader: str | None = None, limit: int = 0) -> Sequence[StoredRun]:
        """Return runs, the newest first.

        Args:
            reader: only those that are this submitter's or that it may read; None: all.
            limit: at most so many; 0: all.
        """
        wanted = select(runs).order_by(runs.c.place.desc())
        if reader is not None:
            shared = select(run_readers.c.run).where(run_readers.c.reader.in_((reader, EVERYONE)))
            wanted = wanted.where(or_(runs.c.submitter == reader, runs.c.id.in_(shared)))
        with self._database.reading() as connection:
            return read_runs(connection, connection.execute(wanted.limit(limit) if limit else wanted).all())

    def list_unended(self) -> Sequence[StoredRun]:
        """Return the runs that have not ended, the oldest first."""
        wanted = select(runs).where(runs.c.status.in_(UNENDED)).order_by(runs.c.place)
        with self._database.reading() as connection:
            return read_runs(connection, connection.execute(wanted).all())

    def next_queued(self, *, without: Collection[str], digests: Collection[str]) -> StoredRun | None:
        """Return the oldest queued run that is none of `without` and of none of these run files."""
        wanted = (
            select(runs)
            .where(
                runs.c.status == RunStatus.QUEUED, runs.c.id.not_in(without), runs.c.digest.not_in(digests)
            )
            .order_by(runs.c.place)
            .limit(1)
        )
        with self._database.reading() as connection:
            found = read_runs(connection, connection.execute(wanted).all())
        return found[0] if found else None

    def measure(self, run_id: str, folder_bytes: int) -> None:
        """Count what a run that has ended keeps, with so many bytes in its folder, for its submitter."""
        with self._database.writing() as connection:
            set_kept(connection, run_id, folder_bytes)

    def forget_contents(self, run_id: str) -> Collection[str]:
        """Let go of the checkpoints and waiting updates of a run that has ended, and whose folder is gone.

        Returns:
            Digests of the contents that they were in.
        """
        own = checkpoints.c.run == run_id
        waiting = (updates.c.run == run_id) & updates.c.counted.is_(False)
        with self._database.writing() as connection:
            digests = set(connection.execute(select(checkpoints.c.digest).where(own)).scalars())
            digests.update(connection.execute(select(updates.c.digest).where(waiting)).scalars())
            connection.execute(checkpoints.delete().where(own))
            connection.execute(updates.delete().where(waiting))
            set_kept(connection, run_id, 0)
        return digests

    def set_status(self, run_id: str, status: RunStatus, reason: str = "") -> None:
        """Say how a run stands, and why; the change is also a line of its log.

        Nothing is changed where the run has ended, or is being stopped and would go on.
        """
        reason = reason.replace("\x00", " ")  # no text of PostgreSQL holds one, and an agent's words may
        with self._database.writing() as connection:
            stands = select(runs.c.status, runs.c.reason).where(runs.c.id == run_id)
            now, why = connection.execute(stands).one()
            if (now, why) == (status, reason) or not _may_become(now, status):
                return
            changed = {"status": status, "reason": reason, "changed_at": time.time()}
            connection.execute(runs.update().where(runs.c.id == run_id).values(changed))
            add_line(connection, run_id, event_line("status", status=status, reason=reason))
            crash_point("server.status.written")
        crash_point("server.status.committed")

    def finish(self, run_id: str, adapter_digest: str) -> None:
        """The run's folder is complete."""
        with self._database.writing() as connection:
            changed = {
                "status": RunStatus.FINISHED,
                "reason": "",
                "changed_at": time.time(),
                "adapter_digest": adapter_digest,
            }
            connection.execute(runs.update().where(runs.c.id == run_id).values(changed))
            add_line(connection, run_id, event_line("status", status=RunStatus.FINISHED, reason=""))
            crash_point("server.finish.written")
        crash_point("server.finish.committed")

    def say(self, run_id: str, text: str) -> None:
        """Add a line of JSON to the run's log."""
        say(self._database, run_id, text)

    def lines(self, run_id: str, *, after: int = 0, limit: int = 1000) -> Sequence[Line]:
        """Lines of the log with a higher number than `after`."""
        with self._database.reading() as connection:
            return read_lines(connection, run_id, after, limit)

    def roster(self, run_id: str) -> Roster | None:
        """Return who answered the roll call; None before it.

        Raises:
            StateError: this version cannot read it.
        """
        with self._database.reading() as connection:
            text = connection.execute(select(runs.c.roster).where(runs.c.id == run_id)).scalar_one()
        try:
            return None if text is None else _ROSTER.validate_json(text)
        except ValidationError as error:
            raise StateError(
                f"this version cannot read the roster of run {run_id}; go on with it in the version that it"
                " was submitted to, or submit it anew"
            ) from error

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


def _may_become(now: str, status: RunStatus) -> bool:
    """Whether a run may come to stand otherwise; one whose status this version does not know may end."""
    known = now in set(RunStatus)
    return RunStatus(now).may_become(status) if known else status.final


def _epsilon(connection: Connection, run_id: str, round_: int | None) -> float | None:
    """What a private run had spent after its last committed round."""
    wanted = select(rounds.c.row).where(rounds.c.run == run_id, rounds.c.number == round_)
    text = connection.execute(wanted).scalar_one_or_none()
    stated = json.loads(text).get("epsilon") if text else None
    return None if stated is None else float(stated)  # infinities are written as text


def _submission_key(submitter: str, submission: str) -> str:
    """Return what stands for a submission's name, which is the submitter's own."""
    return hashlib.sha256(f"{submitter}\n{submission}".encode()).hexdigest()


def _find_submitted(connection: Connection, key: str, digest: str, submission: str) -> StoredRun | None:
    known = read_runs(connection, connection.execute(select(runs).where(runs.c.submission == key)).all())
    if known and known[0].digest != digest:
        raise UsageError(
            f"submission {submission[:80]!r} came before with another run file; give it another name"
        )
    return known[0] if known else None
