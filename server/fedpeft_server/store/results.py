"""Agents' results, durable before they are acknowledged."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, func, select, tuple_

from fedpeft.config.run_file import run_from_json
from fedpeft.errors import RunFileError
from fedpeft.rounds.buffered.in_flight import overlap_of
from fedpeft.runtime.crash_points import crash_point
from fedpeft.transport.tasks import TRAIN
from fedpeft_server.server_metrics import ServerMetrics
from fedpeft_server.store.blobs import BlobFolder
from fedpeft_server.store.contracts import ENOUGH, ReceivedResult
from fedpeft_server.store.database import Database
from fedpeft_server.store.rounds import list_used_blobs
from fedpeft_server.store.schema import refusals, rounds, runs, updates

Key = tuple[str, int, str]  # run, round, agent
_ASKED = 400  # keys per question; databases bound the number of parameters
CLOSED, DIFFERENT, UNKNOWN, LOST = "round-closed", "different-result", "unknown-run", "blob-missing"
SPARE = "spare"
_WORDS = {
    CLOSED: "the round that it belongs to is closed",
    DIFFERENT: "another result for this task was accepted before",
    UNKNOWN: "there is no such run or round",
    LOST: "its content is not there; upload it again",
    SPARE: ENOUGH,
}


@dataclass(frozen=True)
class Standing:
    """What a run takes now.

    Attributes:
        takes: rounds whose updates it takes: the open one, and where rounds are buffered some before it.
        opened_at: when the open round was opened; None between two rounds.
        places: for updates of the open round; None: everybody who was asked has one.
    """

    takes: range
    opened_at: float | None
    places: int | None = None


class Results:
    """Updates that agents sent, at most one per run, round and agent. See `contracts.Acceptor`.

    Of an over-selected cohort no more are taken in than there are places, so that being durable and being
    counted are one decision, and a restart cannot come to another one. An update that proves unsound gives
    its place back.

    Greetings are taken and not kept: after a restart agents are asked anew, and may have changed.
    """

    def __init__(self, database: Database, blobs: BlobFolder, metrics: ServerMetrics) -> None:
        self._database = database
        self._blobs = blobs
        self._metrics = metrics
        self._overlaps: dict[str, int] = {}  # by run: see `overlap_of`; a cache, runs never change
        self._places: dict[str, tuple[int, int | None]] = {}  # by run: the open round and its places; a cache
        self._lock = threading.Lock()
        self._unsound: dict[str, set[Key]] = {}  # by run, of its open round

    def accept(self, arrivals: Sequence[ReceivedResult]) -> Sequence[str | None]:
        """Make all of them durable in one transaction; for each None, or why it does not count.

        Raises:
            StorageError: nothing was stored.
        """
        crash_point("server.accept.begun")
        with self._database.writing() as connection:
            standing = self._standing(connection, {arrival.run for arrival in arrivals})
            verdicts, fresh = self._judge(connection, arrivals, standing)
            if fresh:
                connection.execute(updates.insert(), fresh)
            crash_point("server.accept.inserted")
            _count(connection, arrivals, verdicts)
        crash_point("server.accept.committed")
        self._measure(arrivals, verdicts, fresh, standing)
        self._discard(
            [a.digest for a, v in zip(arrivals, verdicts, strict=True) if v == SPARE and a.body is None]
        )
        return [None if verdict is None else _WORDS[verdict] for verdict in verdicts]

    def recall(self, run: str, round_: int, kind: str) -> Sequence[ReceivedResult]:
        """Results that were accepted before, also before a restart; bodies of blobs stay where they are."""
        if kind != TRAIN:
            return []
        wanted = (
            select(updates)
            .where(updates.c.run == run, updates.c.round == round_, updates.c.counted.is_(False))
            .order_by(updates.c.agent)
        )
        with self._database.reading() as connection:
            return [_arrival(row) for row in connection.execute(wanted)]

    def free_place(self, run: str, round_: int, agent: str) -> None:
        """See `Acceptor`."""
        with self._lock:
            earlier = {key for key in self._unsound.get(run, ()) if key[1] == round_}
            self._unsound[run] = {*earlier, (run, round_, agent)}

    def _discard(self, digests: Sequence[str]) -> None:
        """Delete contents that found no place; if there is one after all, they are sent again."""
        if not digests:
            return
        with self._database.reading() as connection:
            still = list_used_blobs(connection)
        self._blobs.remove(sorted(set(digests) - still))

    def _judge(
        self, connection: Connection, arrivals: Sequence[ReceivedResult], standing: Mapping[str, Standing]
    ) -> tuple[list[str | None], list[dict[str, Any]]]:
        """A verdict for each, and the rows to insert."""
        known = _find_known(connection, [_key(arrival) for arrival in arrivals])
        room = {run: self._room(connection, run, stands) for run, stands in standing.items()}
        verdicts: list[str | None] = []
        fresh: list[dict[str, Any]] = []
        for arrival in arrivals:
            key = _key(arrival)
            verdict = self._verdict(arrival, key, standing, known)
            fresh_one = verdict is None and key not in known and arrival.kind == TRAIN
            if fresh_one and room[arrival.run] <= 0:
                verdict = SPARE
            verdicts.append(verdict)
            if fresh_one and verdict is None:
                room[arrival.run] -= 1
                known[key] = arrival.digest
                fresh.append(_row(arrival, key))
        return verdicts, fresh

    def _verdict(
        self, arrival: ReceivedResult, key: Key, standing: Mapping[str, Standing], known: Mapping[Key, str]
    ) -> str | None:
        if key in known and arrival.kind == TRAIN:
            return None if known[key] == arrival.digest else DIFFERENT
        if arrival.run not in standing:
            return UNKNOWN
        if arrival.kind == TRAIN and key[1] not in standing[arrival.run].takes:
            return CLOSED
        if arrival.body is None and not self._blobs.has(arrival.digest):
            return LOST
        return None

    def _measure(
        self,
        arrivals: Sequence[ReceivedResult],
        verdicts: Sequence[str | None],
        fresh: Sequence[Mapping[str, Any]],
        standing: Mapping[str, Standing],
    ) -> None:
        """Count what was stored, repetitions left out, and what wasn't."""
        for row in fresh:
            opened = standing[row["run"]].opened_at or row["accepted_at"]
            self._metrics.count_accepted(TRAIN, row["size"], row["accepted_at"] - opened)
        for arrival, verdict in zip(arrivals, verdicts, strict=True):
            if verdict is not None:
                self._metrics.count_refused(verdict)
            elif arrival.kind != TRAIN:
                self._metrics.count_accepted(arrival.kind, arrival.size, None)

    def _standing(self, connection: Connection, names: Iterable[str]) -> dict[str, Standing]:
        """Runs that exist, and what they take.

        Between two rounds a buffered run takes what the next one will: its agents are at work all the time.
        """
        wanted = list(names)
        there = list(connection.execute(select(runs.c.id).where(runs.c.id.in_(wanted))).scalars())
        self._learn(connection, [run for run in there if run not in self._overlaps])
        mine = rounds.c.run.in_(wanted)
        newest = select(rounds.c.run, func.max(rounds.c.number)).where(mine).group_by(rounds.c.run)
        last: dict[str, int] = {row[0]: row[1] for row in connection.execute(newest)}
        open_ = select(rounds.c.run, rounds.c.number, rounds.c.opened_at).where(
            mine, rounds.c.status == "open"
        )
        under_way = {
            run: (number, opened, self._places_of(connection, run, number))
            for run, number, opened in list(connection.execute(open_))
        }
        return {run: _standing_of(self._overlaps[run], last.get(run), under_way.get(run)) for run in there}

    def _places_of(self, connection: Connection, run: str, number: int) -> int | None:
        """A round's places; its cohort, which may name thousands, is read once."""
        known = self._places.get(run)
        if known is None or known[0] != number:
            place = (rounds.c.run == run) & (rounds.c.number == number)
            cohort = json.loads(connection.execute(select(rounds.c.cohort).where(place)).scalar_one())
            known = self._places[run] = (number, (cohort or {}).get("places"))
        return known[1]

    def _room(self, connection: Connection, run: str, standing: Standing) -> float:
        """How many more updates a run takes in now."""
        if standing.places is None:
            return math.inf
        number = standing.takes[-1]
        there = select(updates.c.agent).where(updates.c.run == run, updates.c.round == number)
        with self._lock:
            unsound = set(self._unsound.get(run, ()))
        taken = sum((run, number, agent) not in unsound for agent in connection.execute(there).scalars())
        return standing.places - taken

    def _learn(self, connection: Connection, names: Sequence[str]) -> None:
        described = select(runs.c.id, runs.c.run_json).where(runs.c.id.in_(names)) if names else None
        for run, text in connection.execute(described) if described is not None else ():
            try:
                self._overlaps[run] = overlap_of(run_from_json(text))
            except RunFileError:  # this version cannot read it, and opens no round of it
                self._overlaps[run] = 0


def _standing_of(overlap: int, last: int | None, under_way: tuple[int, float, int | None] | None) -> Standing:
    """Args: rounds before the current one whose updates count too; the newest round; the open one."""
    if under_way is not None:
        number, opened, places = under_way
        return Standing(range(number - overlap, number + 1), opened, places)
    if last is None or not overlap:
        return Standing(range(0), None)
    return Standing(range(last + 1 - overlap, last + 1), None)


def _key(arrival: ReceivedResult) -> Key:
    return arrival.run, arrival.round, arrival.agent


def _find_known(connection: Connection, keys: Sequence[Key]) -> dict[Key, str]:
    """Digests of those results that are there already."""
    columns = (updates.c.run, updates.c.round, updates.c.agent)
    found: dict[Key, str] = {}
    for start in range(0, len(keys), _ASKED):
        some = keys[start : start + _ASKED]
        wanted = select(*columns, updates.c.digest).where(tuple_(*columns).in_(some))
        for run, round_, agent, digest in connection.execute(wanted):
            found[run, round_, agent] = digest
    return found


def _row(arrival: ReceivedResult, key: Key) -> dict[str, Any]:
    run, round_, agent = key
    return {
        "run": run,
        "round": round_,
        "agent": agent,
        "task": arrival.task,
        "digest": arrival.digest,
        "size": arrival.size,
        "body": arrival.body,
        "signature": arrival.signature,
        "accepted_at": time.time(),
        "counted": False,
    }


def _count(
    connection: Connection, arrivals: Sequence[ReceivedResult], verdicts: Sequence[str | None]
) -> None:
    """Count the refusals of runs that exist by their reasons."""
    counts = Counter(
        (arrival.run, verdict)
        for arrival, verdict in zip(arrivals, verdicts, strict=True)
        if verdict is not None
    )
    for (run, reason), count in counts.items():
        place = (refusals.c.run == run) & (refusals.c.reason == reason)
        changed = connection.execute(
            refusals.update().where(place).values(count=refusals.c.count + count)
        ).rowcount
        if not changed:
            connection.execute(refusals.insert().values(run=run, reason=reason, count=count))


def _arrival(row: Row[Any]) -> ReceivedResult:
    return ReceivedResult(
        run=row.run,
        run_digest="",
        round=row.round,
        kind=TRAIN,
        agent=row.agent,
        task=bytes(row.task),
        digest=row.digest,
        size=row.size,
        body=None if row.body is None else bytes(row.body),
        signature=bytes(row.signature),
    )
