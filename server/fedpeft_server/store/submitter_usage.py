"""What one submitter's runs take of a server, and how much they may."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from fedpeft.config.run_file import run_from_json
from fedpeft.config.sections import RunConfig
from fedpeft.errors import LimitError, RunFileError
from fedpeft_server.store.schema import checkpoints, runs, submitters, updates
from fedpeft_server.store.stored_run import UNENDED


@dataclass(frozen=True)
class Quota:
    """Bounds for each submitter.

    Attributes:
        runs: that have not ended.
        rounds: of these together, by their run files.
        kept_bytes: of checkpoints, updates and folders of all its runs, ended or not.
    """

    runs: int = 16
    rounds: int = 50_000
    kept_bytes: int = 64 << 30


def check_quota(connection: Connection, submitter: str, run: RunConfig, quota: Quota) -> None:
    """Refuse one more run of a submitter that has its share.

    Raises:
        LimitError: it has.
    """
    wanted = select(runs.c.run_json).where(runs.c.submitter == submitter, runs.c.status.in_(UNENDED))
    under_way = list(connection.execute(wanted.limit(quota.runs)).scalars())
    if len(under_way) >= quota.runs:
        raise LimitError(
            f"{len(under_way)} runs of {submitter!r} have not ended, which is the most; wait for one, or stop"
            " one: fedpeft run stop RUN"
        )
    rounds = sum(map(_rounds_of, under_way))
    if rounds + run.run.rounds > quota.rounds:
        raise LimitError(
            f"the run has {run.run.rounds} rounds and those of {submitter!r} that have not ended {rounds};"
            f" {quota.rounds} together are the most: give it fewer, or wait for one to end"
        )
    line = over_quota(connection, submitter, quota)
    if line is not None:
        raise LimitError(line)


def _rounds_of(text: str) -> int:
    """Return how many rounds a stored run has; one that this version cannot read takes none of its time."""
    try:
        return run_from_json(text).run.rounds
    except RunFileError:
        return 0


def over_quota(connection: Connection, submitter: str, quota: Quota) -> str | None:
    """Say that a submitter's runs keep too many bytes; None: they don't."""
    wanted = select(submitters.c.kept_bytes).where(submitters.c.name == submitter)
    kept = int(connection.execute(wanted).scalar_one_or_none() or 0)
    if kept < quota.kept_bytes:
        return None
    return (
        f"the runs of {submitter!r} keep {kept / 2**30:.1f} GiB on this server,"
        f" {quota.kept_bytes / 2**30:.1f} are the most; pull those that have ended, then delete their files:"
        " fedpeft run remove RUN"
    )


def add_kept(connection: Connection, run_id: str, more: int) -> None:
    """Count bytes that a run keeps from now on, or with a negative number no longer."""
    changed = runs.update().where(runs.c.id == run_id).values(kept_bytes=runs.c.kept_bytes + more)
    connection.execute(changed)
    submitter = connection.execute(select(runs.c.submitter).where(runs.c.id == run_id)).scalar_one()
    mine = submitters.update().where(submitters.c.name == submitter)
    if not connection.execute(mine.values(kept_bytes=submitters.c.kept_bytes + more)).rowcount:
        connection.execute(submitters.insert().values(name=submitter, kept_bytes=more))


def set_kept(connection: Connection, run_id: str, folder_bytes: int) -> None:
    """Count anew what a run keeps in the store, with so many bytes in its folder."""
    stored = select(func.coalesce(func.sum(checkpoints.c.size), 0)).where(checkpoints.c.run == run_id)
    waiting = select(func.coalesce(func.sum(updates.c.size), 0)).where(
        updates.c.run == run_id, updates.c.counted.is_(False)
    )
    total = folder_bytes + sum(int(connection.execute(each).scalar_one()) for each in (stored, waiting))
    before = int(connection.execute(select(runs.c.kept_bytes).where(runs.c.id == run_id)).scalar_one())
    add_kept(connection, run_id, total - before)
