"""Evaluating a state with all workers.

Test rows are dealt out in fixed batches, so the result doesn't depend on how many workers there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.config.sections import RunConfig
from fedpeft.data.encoded import Encoded
from fedpeft.data.section_layout import EMBEDDED
from fedpeft.evaluation.evaluate import join, summarise
from fedpeft.evaluation.metrics import Column
from fedpeft.ledger.records import Evaluation
from fedpeft.participant.loaded_run import LoadedRun, get_loaded_run
from fedpeft.runtime.randomness import stream
from fedpeft.updates.update import Arrays
from fedpeft.workers import Job, Shared, Workers

TEST, HELD_OUT = "test", "held-out"


@dataclass(frozen=True)
class Scorer:
    """Evaluates states on the global test set and on each client's held-out rows.

    Without a test set of its own a run's test set is the clients' held-out rows, and each row is scored once.
    A private run scores no row of its clients: exact scores of them would tell what the noise hides.
    """

    resident: LoadedRun
    metrics: tuple[str, ...]
    workers: Workers

    def evaluate(self, state: Arrays) -> Evaluation | None:
        """Scores with intervals, and per client; None if there is no row to score."""
        data, section = self.resident.data, self.resident.run.evaluation
        if not len(data.test) or not may_score(self.resident.run):
            return None
        rng = stream(self.resident.run.run.seed, "bootstrap")
        columns = self._columns(TEST, state)
        if self.resident.run.privacy is not None:
            found = summarise(columns, self.metrics, clients={}, resamples=section.bootstrap, rng=rng)
            return found.model_copy(update={"clients": {}})
        if own_test_set(self.resident.run):
            held = self._columns(HELD_OUT, state) if any(len(c.heldout) for c in data.clients) else None
            places = places_of(
                {c.name: c.heldout for c in data.clients}, held["index"] if held else np.zeros(0)
            )
            return summarise(
                columns,
                self.metrics,
                clients=places,
                client_columns=held,
                resamples=section.bootstrap,
                rng=rng,
            )
        places = places_of(test_rows_of_clients(self.resident), columns["index"])
        return summarise(columns, self.metrics, clients=places, resamples=section.bootstrap, rng=rng)

    def evaluate_each(self, states: Mapping[str, Arrays]) -> Evaluation | None:
        """Each client's own model on its own held-out rows; None if there is no row to score."""
        resident, section = self.resident, self.resident.run.evaluation
        rows = {
            client.name: own_rows(resident, index)[1] for index, client in enumerate(resident.data.clients)
        }
        jobs: list[Job[dict[str, Column]]] = [
            self.workers.submit(
                score_own,
                resident.run_digest,
                index,
                self.workers.share(dict(states[client.name])),
                self.metrics,
            )
            for index, client in enumerate(resident.data.clients)
            if len(rows[client.name])
        ]
        if not jobs:
            return None
        columns = join([job.result() for job in jobs])
        rng = stream(resident.run.run.seed, "bootstrap")
        places = places_of(rows, columns["index"])
        return summarise(columns, self.metrics, clients=places, resamples=section.bootstrap, rng=rng)

    def _columns(self, which: str, state: Arrays) -> dict[str, Column]:
        count = len(batches_of(self.resident, which))
        width = min(self.workers.width * 4, count)  # a few shards each, so that none waits long for the last
        shared = self.workers.share(dict(state))
        jobs: list[Job[dict[str, Column]]] = [
            self.workers.submit(
                score_shard, self.resident.run_digest, which, shard, width, shared, self.metrics
            )
            for shard in range(width)
        ]
        shards: list[dict[str, Column]] = [job.result() for job in jobs]
        return join(shards)


def may_score(run: RunConfig) -> bool:
    """Whether there are rows that may be scored: a private run needs a test set of its own, taken for public.

    The embedded rows are nobody's: a generator writes them.
    """
    return run.privacy is None or run.data.test is not None or run.data.train == EMBEDDED


def own_test_set(run: RunConfig) -> bool:
    """Whether the run names a test set beside the clients' rows."""
    return run.data.test is not None


def score_shard(
    run_digest: str, which: str, shard: int, shards: int, state: Shared, metrics: Sequence[str]
) -> dict[str, Column]:
    """One worker's share of the batches."""
    resident = get_loaded_run(run_digest)
    encoded = rows_of(resident, which)[0]
    return resident.score(encoded, batches_of(resident, which)[shard::shards], state.get(), metrics)


def score_own(run_digest: str, index: int, state: Shared, metrics: Sequence[str]) -> dict[str, Column]:
    """One client's model on its own held-out rows."""
    whole = get_loaded_run(run_digest)
    resident = whole.of_client(whole.data.clients[index].name)
    encoded, rows = own_rows(whole, index)
    return resident.score(encoded, resident.batches(encoded, rows), state.get(), metrics)


def own_rows(resident: LoadedRun, index: int) -> tuple[Encoded, NDArray[np.int64]]:
    """A client's held-out rows, at most `evaluation.max_examples`."""
    data, limit = resident.data, resident.run.evaluation.max_examples
    client = data.clients[index]
    if own_test_set(resident.run):
        return data.rows, client.heldout[:limit]
    return data.test, test_rows_of_clients(resident)[client.name][:limit]


def rows_of(resident: LoadedRun, which: str) -> tuple[Encoded, NDArray[np.int64]]:
    """The rows of an evaluation set, at most `evaluation.max_examples` of the test set and of each client."""
    data, limit = resident.data, resident.run.evaluation.max_examples
    if which == TEST and own_test_set(resident.run):
        return data.test, np.arange(len(data.test), dtype=np.int64)[:limit]
    if which == TEST:
        mine = [rows[:limit] for rows in test_rows_of_clients(resident).values()]
        return data.test, np.concatenate([np.zeros(0, dtype=np.int64), *mine])
    return data.rows, np.concatenate([client.heldout[:limit] for client in data.clients])


def batches_of(resident: LoadedRun, which: str) -> list[NDArray[np.int64]]:
    """Its batches."""
    return resident.batches(*rows_of(resident, which))


def test_rows_of_clients(resident: LoadedRun) -> dict[str, NDArray[np.int64]]:
    """Which rows of a test set that is made of held-out rows are whose: they lie client by client."""
    sizes = [len(client.heldout) for client in resident.data.clients]
    ends = np.cumsum([0, *sizes])
    return {
        client.name: np.arange(start, end, dtype=np.int64)
        for client, start, end in zip(resident.data.clients, ends[:-1], ends[1:], strict=True)
    }


def places_of(rows: dict[str, NDArray[np.int64]], index: Column) -> dict[str, NDArray[np.int64]]:
    """Positions of each client's rows in columns whose row numbers are `index`."""
    position = {int(row): place for place, row in enumerate(index)}
    return {
        name: np.array([position[int(row)] for row in mine if int(row) in position], dtype=np.int64)
        for name, mine in rows.items()
    }
