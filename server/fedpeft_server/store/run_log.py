"""A run's log: numbered lines of JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from fedpeft_server.store.database import Database
from fedpeft_server.store.schema import lines, runs


@dataclass(frozen=True)
class Line:
    """One line of a run's log: a row of `metrics.jsonl`, or an event with `event` and `text`."""

    number: int
    at: float
    text: str


def say(database: Database, run_id: str, text: str) -> None:
    """Add a line of JSON to a run's log, durably."""
    with database.writing() as connection:
        add_line(connection, run_id, text)


def add_line(connection: Connection, run_id: str, text: str) -> None:
    """One more line of a run's log, in the caller's transaction."""
    # Databases with several writers number lines one after the other; SQLite has one writer anyway.
    connection.execute(select(runs.c.id).where(runs.c.id == run_id).with_for_update())
    last = select(func.coalesce(func.max(lines.c.number), 0)).where(lines.c.run == run_id)
    number = int(connection.execute(last).scalar_one()) + 1
    connection.execute(lines.insert().values(run=run_id, number=number, at=time.time(), text=text))


def event_line(kind: str, **fields: str) -> str:
    """Return the line of an event that is no row of `metrics.jsonl`."""
    return json.dumps({"event": kind, **fields})


def read_lines(connection: Connection, run_id: str, after: int, limit: int) -> Sequence[Line]:
    """Read lines with a higher number than `after`."""
    wanted = select(lines).where(lines.c.run == run_id, lines.c.number > after)
    found = connection.execute(wanted.order_by(lines.c.number).limit(limit))
    return [Line(row.number, row.at, row.text) for row in found]
