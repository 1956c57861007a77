"""One run's rounds in the store: the journal of its round loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from pydantic import TypeAdapter
from sqlalchemy import Connection, select, tuple_

from fedpeft.errors import StateError
from fedpeft.ledger import Checkpoint, Cohort
from fedpeft.ledger.checkpoint import checkpoint_bytes, parse_checkpoint
from fedpeft.ledger.records import Round
from fedpeft.runtime.crash_points import crash_point
from fedpeft_server.store.blobs import BlobFolder
from fedpeft_server.store.database import Database
from fedpeft_server.store.run_log import add_line
from fedpeft_server.store.schema import budget, checkpoints, rounds, runs, updates
from fedpeft_server.store.submitter_usage import add_kept

OPEN, CLOSED = "open", "closed"
_COHORT = TypeAdapter(Cohort)


class StoredRounds:
    """A journal whose every round is one transaction.

    Args:
        keep: how many checkpoints stay, the newest ones; None: all.
        deadline_s: of a round; written down for people only.
        gate: called before each durable step; may raise to keep the run from going on.
        closed: told the length in seconds of each round that was committed, by the wall clock.
    """

    resumes = True

    def __init__(
        self,
        database: Database,
        blobs: BlobFolder,
        run_id: str,
        digest: str,
        *,
        keep: int | None = None,
        deadline_s: float | None = None,
        gate: Callable[[], None] = lambda: None,
        closed: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._database = database
        self._blobs = blobs
        self._run = run_id
        self._digest = digest
        self._keep = keep
        self._deadline_s = deadline_s
        self._gate = gate
        self._closed = closed

    def open_round(self, number: int, draw: Callable[[], Cohort]) -> Cohort:
        """The round's cohort: drawn and made durable before anyone is asked, or the one of before a restart.

        Raises:
            StateError: the round is closed already.
            StorageError: it cannot be stored; nobody may be asked.
        """
        self._gate()
        place = (rounds.c.run == self._run) & (rounds.c.number == number)
        with self._database.reading() as connection:
            known = connection.execute(select(rounds.c.status, rounds.c.cohort).where(place)).first()
        if known is not None:
            if known.status != OPEN:
                raise StateError(f"round {number} of run {self._run} is closed already; restore a backup")
            return _COHORT.validate_json(known.cohort)
        cohort = draw()
        crash_point("server.round.drawn")
        now = time.time()
        with self._database.writing() as connection:
            connection.execute(
                rounds.insert().values(
                    run=self._run,
                    number=number,
                    status=OPEN,
                    cohort=_COHORT.dump_json(cohort).decode(),
                    opened_at=now,
                    deadline_at=None if self._deadline_s is None else now + self._deadline_s,
                )
            )
            crash_point("server.round.written")
        crash_point("server.round.opened")
        return cohort

    def is_open(self, number: int) -> bool:
        """Whether a round's cohort is durable, so that nobody can join it any more."""
        place = (rounds.c.run == self._run) & (rounds.c.number == number)
        with self._database.reading() as connection:
            return connection.execute(select(rounds.c.number).where(place)).first() is not None

    def commit(self, checkpoint: Checkpoint) -> None:
        """Close a round: checkpoint, row and the end of its results' life, all in one transaction.

        The checkpoint's content is a blob and durable before the transaction that names it.

        Raises:
            StorageError: nothing is committed; the round is still open.
        """
        self._gate()
        crash_point("server.checkpoint.begun")
        content = checkpoint_bytes(checkpoint)
        digest = self._blobs.put(content)
        crash_point("server.checkpoint.written")
        with self._database.writing() as connection:
            seconds = self._close(connection, checkpoint)
            connection.execute(
                checkpoints.insert().values(
                    run=self._run, round=checkpoint.round, digest=digest, size=len(content)
                )
            )
            crash_point("server.commit.written")
            outdated, freed = self._drop_outdated(connection)
            unused = [*self._mark_counted(connection, checkpoint.row), *outdated]
            add_kept(connection, self._run, len(content) - freed)
            crash_point("server.commit.counted")
        crash_point("server.commit.committed")
        if seconds is not None:
            self._closed(seconds)
        self._forget(unused)

    def latest(self) -> Checkpoint | None:
        """The newest committed round; None before the first.

        Raises:
            StateError: its content is missing or corrupt.
        """
        newest = (
            select(checkpoints)
            .where(checkpoints.c.run == self._run)
            .order_by(checkpoints.c.round.desc())
            .limit(1)
        )
        with self._database.reading() as connection:
            row = connection.execute(newest).first()
        if row is None:
            return None
        return parse_checkpoint(self._blobs.get(row.digest), self._blobs.path(row.digest), self._digest)

    def last_row(self) -> str | None:
        """JSON of the newest closed round's record; None before the first."""
        newest = (
            select(rounds.c.row)
            .where(rounds.c.run == self._run, rounds.c.row.is_not(None))
            .order_by(rounds.c.number.desc())
        )
        with self._database.reading() as connection:
            return connection.execute(newest.limit(1)).scalar_one_or_none()

    def rows(self, newest: int | None = None) -> Iterator[str]:
        """Records of closed rounds as JSON, the newest first.

        Args:
            newest: so many at most; None: all.
        """
        wanted = (
            select(rounds.c.row)
            .where(rounds.c.run == self._run, rounds.c.row.is_not(None))
            .order_by(rounds.c.number.desc())
            .limit(newest)
        )
        with self._database.reading() as connection:
            yield from connection.execution_options(yield_per=100).execute(wanted).scalars()

    def read_spent_ledger(self) -> str | None:
        """The ledger of spent privacy that was committed last; None before the first charge."""
        with self._database.reading() as connection:
            return connection.execute(
                select(budget.c.ledger).where(budget.c.run == self._run)
            ).scalar_one_or_none()

    def commit_spent(self, ledger: str) -> None:
        """Make the ledger durable; nothing may be released before this returns."""
        self._gate()
        crash_point("server.budget.begun")
        mine = budget.c.run == self._run
        with self._database.writing() as connection:
            if not connection.execute(budget.update().where(mine).values(ledger=ledger)).rowcount:
                connection.execute(budget.insert().values(run=self._run, ledger=ledger))
            crash_point("server.budget.written")
        crash_point("server.budget.committed")

    def contents(self) -> dict[int, bytes]:
        """The first and the last checkpoint as files, by round: what commands ask of a run's folder."""
        wanted = (
            select(checkpoints.c.round, checkpoints.c.digest)
            .where(checkpoints.c.run == self._run)
            .order_by(checkpoints.c.round)
        )
        with self._database.reading() as connection:
            rows = [(row.round, row.digest) for row in connection.execute(wanted)]
        return {number: self._blobs.get(digest) for number, digest in (*rows[:1], *rows[1:][-1:])}

    def _close(self, connection: Connection, checkpoint: Checkpoint) -> float | None:
        """Write the round's end; its length in seconds, None where it was never open."""
        row, now = checkpoint.row.model_dump_json(), time.time()
        place = (rounds.c.run == self._run) & (rounds.c.number == checkpoint.round)
        under_way = place & (rounds.c.status == OPEN)
        opened = connection.execute(select(rounds.c.opened_at).where(under_way)).scalar_one_or_none()
        if opened is not None:
            connection.execute(rounds.update().where(under_way).values(status=CLOSED, row=row, closed_at=now))
        else:  # round 0 asks nobody; any other has been opened, and the key refuses a second time
            connection.execute(
                rounds.insert().values(
                    run=self._run,
                    number=checkpoint.round,
                    status=CLOSED,
                    cohort="null",
                    opened_at=now,
                    closed_at=now,
                    row=row,
                )
            )
        add_line(connection, self._run, row)
        connection.execute(runs.update().where(runs.c.id == self._run).values(changed_at=now))
        return None if opened is None else now - opened

    def checkpoint(self, number: int) -> Checkpoint:
        """A committed round.

        Raises:
            StateError: it is not kept, or its content is missing or corrupt.
        """
        place = (checkpoints.c.run == self._run) & (checkpoints.c.round == number)
        with self._database.reading() as connection:
            digest = connection.execute(select(checkpoints.c.digest).where(place)).scalar_one_or_none()
        if digest is None:
            raise StateError(
                f"round {number} of run {self._run} is not kept, and agents are at work on its state"
            )
        return parse_checkpoint(self._blobs.get(digest), self._blobs.path(digest), self._digest)

    def list_uncommitted(self) -> Sequence[tuple[str, int]]:
        """Accepted updates that no committed round counts: (agent, round of its task), as they came."""
        waiting = (
            select(updates.c.agent, updates.c.round)
            .where(updates.c.run == self._run, updates.c.counted.is_(False))
            .order_by(updates.c.accepted_at, updates.c.agent)
        )
        with self._database.reading() as connection:
            return [(agent, number) for agent, number in connection.execute(waiting)]

    def _mark_counted(self, connection: Connection, row: Round) -> list[str]:
        """Mark the round's results as counted and let go of their contents; digests of those in blobs.

        A buffered round's results are of several rounds' tasks, and its row names them.
        """
        tasks = [
            (item.client, row.round - item.staleness) for item in row.outcomes if item.staleness is not None
        ]
        here = updates.c.round == row.round
        if tasks:
            here = tuple_(updates.c.agent, updates.c.round).in_(tasks)
        mine = (updates.c.run == self._run) & here
        in_blobs = select(updates.c.digest).where(mine & updates.c.body.is_(None))
        digests = list(connection.execute(in_blobs).scalars())
        connection.execute(updates.update().where(mine).values(counted=True, body=None))
        return digests

    def _drop_outdated(self, connection: Connection) -> tuple[list[str], int]:
        """Drop the checkpoints beyond those to keep; their digests, and how many bytes they had."""
        if self._keep is None:
            return [], 0
        mine = checkpoints.c.run == self._run
        newest = select(checkpoints.c.round).where(mine).order_by(checkpoints.c.round.desc())
        kept = list(connection.execute(newest.limit(self._keep)).scalars())
        old = mine & checkpoints.c.round.not_in(kept)
        dropped = connection.execute(select(checkpoints.c.digest, checkpoints.c.size).where(old)).all()
        connection.execute(checkpoints.delete().where(old))
        return [row.digest for row in dropped], sum(row.size for row in dropped)

    def _forget(self, digests: Sequence[str]) -> None:
        """Delete contents that nothing refers to any more."""
        if not digests:
            return
        with self._database.reading() as connection:
            still = list_used_blobs(connection)
        self._blobs.remove(sorted(set(digests) - still))
        crash_point("server.commit.cleaned")


def list_used_blobs(connection: Connection) -> set[str]:
    """Digests of all contents that something refers to."""
    waiting = select(updates.c.digest).where(updates.c.body.is_(None), updates.c.counted.is_(False))
    found = set(connection.execute(waiting).scalars())
    found.update(connection.execute(select(checkpoints.c.digest)).scalars())
    return found
