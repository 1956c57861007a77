"""What tests of the store put into it."""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from dataclasses import replace

import numpy as np

from fedpeft.ledger import Checkpoint, Cohort
from fedpeft.ledger.records import ClientOutcome, Round
from fedpeft_server.store import Store, StoredRun
from fedpeft_server.store.contracts import ReceivedResult

AGENTS = ("ann", "bob", "eve")


def cohort(names: tuple[str, ...] = AGENTS) -> Cohort:
    lost = (ClientOutcome(client="gone", status="dropped", reason="vanished"),)
    return Cohort(names, dict.fromkeys(names, 0.25), lost, 1.5)


def rows(store: Store, query: str) -> list[tuple[object, ...]]:
    """What another connection reads, of a file even past the store's own engine."""
    if not (store.folder / "state.db").exists():
        with store.database.reading() as connection:
            return [tuple(row) for row in connection.exec_driver_sql(query)]
    with closing(sqlite3.connect(f"file:{store.folder / 'state.db'}?mode=ro", uri=True)) as file:
        return file.execute(query).fetchall()


def update(
    stored: StoredRun, round_: int, agent: str, body: bytes | None = None, kind: str = "train"
) -> ReceivedResult:
    body = f"{agent} in round {round_}".encode() if body is None else body
    return ReceivedResult(
        run=stored.id,
        run_digest=stored.digest,
        round=round_,
        kind=kind,
        agent=agent,
        task=hashlib.sha256(agent.encode()).digest()[:16],
        digest=hashlib.sha256(body).hexdigest(),
        size=len(body),
        body=body,
        signature=b"signed by " + agent.encode(),
    )


def recalled(sent: ReceivedResult) -> ReceivedResult:
    """A result as it is handed back: the run's file is known by then, so what names it is empty."""
    return replace(sent, run_digest="")


def checkpoint(stored: StoredRun, round_: int) -> Checkpoint:
    state = {"a": np.full((2, 3), round_, dtype=np.float32)}
    return Checkpoint(stored.digest, round_, state, Round(round=round_), {"m": np.arange(round_ + 1.0)})
