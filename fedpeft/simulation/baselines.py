"""What the federation is compared with: no training, each client alone, and all rows in one place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedpeft.evaluation.evaluate import summarise
from fedpeft.ledger.records import Baseline, Evaluation, Round
from fedpeft.participant.loaded_run import get_loaded_run
from fedpeft.runtime.randomness import stream
from fedpeft.simulation.parallel_scoring import (
    TEST,
    Scorer,
    batches_of,
    own_test_set,
    places_of,
    rows_of,
    test_rows_of_clients,
)
from fedpeft.training.steps import local_steps
from fedpeft.updates.update import Arrays
from fedpeft.workers import Job, Shared

MOST_ALONE = 32  # clients trained alone; of more, an even sample


@dataclass(frozen=True)
class Effort:
    """Optimiser steps, and micro-batches accumulated in each."""

    steps: int
    accumulation: int


@dataclass(frozen=True)
class Budgets:
    """Training that equals what the federation did.

    The pooled model reads as many rows as all counted clients together, in as many steps as they made one
    after the other: each of its steps accumulates the batches that a cohort's clients took side by side. This
    is what the federation would be if it averaged after every step.

    Attributes:
        alone: per client, the steps that it made in the rounds that counted it.
        pooled: of the pooled model.
    """

    alone: Mapping[str, Effort]
    pooled: Effort


def budgets(scorer: Scorer, rounds: Sequence[Round]) -> Budgets:
    """Budgets from what the rounds did. A client that was never counted gets one round's steps."""
    section = scorer.resident.run.training
    steps: dict[str, int] = {}
    examples, deepest = 0, 0
    for row in rounds:
        folded = [outcome for outcome in row.outcomes if outcome.status == "folded"]
        for outcome in folded:
            steps[outcome.client] = steps.get(outcome.client, 0) + outcome.steps
            examples += outcome.examples
        deepest += max((outcome.steps for outcome in folded), default=0)
    alone = {
        client.name: Effort(
            steps.get(client.name) or local_steps(section, len(client.train)), section.gradient_accumulation
        )
        for client in scorer.resident.data.clients
    }
    batches = max(1, round(examples / section.batch_size))
    accumulation = max(1, round(batches / max(deepest, 1)))
    return Budgets(alone, Effort(max(1, round(batches / accumulation)), accumulation))


def run_baselines(
    scorer: Scorer,
    start: Arrays,
    rounds: Sequence[Round],
    done: Sequence[Baseline],
    progress: Callable[[str, int, int], None],
) -> Iterator[Baseline]:
    """Train and evaluate the baselines that are not `done`, in parallel; yields each when it is complete."""
    names = {row.name for row in done}
    first = rounds[0].evaluation
    if "zero-shot" not in names and first is not None:
        yield Baseline(name="zero-shot", evaluations={"zero-shot": first})
    started = time.monotonic()
    budget = budgets(scorer, rounds)
    shared = scorer.workers.share(dict(start))
    jobs: dict[Job[Evaluation], tuple[str, str]] = {}
    if "pooled" not in names:  # the longest job first
        jobs[_submit(scorer, "pooled", None, budget.pooled, shared)] = ("pooled", "pooled")
    if "local" not in names:
        for name in _sample(sorted(budget.alone)):
            jobs[_submit(scorer, f"local/{name}", name, budget.alone[name], shared)] = ("local", name)
    results: dict[str, dict[str, Evaluation]] = {"local": {}, "pooled": {}}
    wanted = {kind: sum(job[0] == kind for job in jobs.values()) for kind in results}
    waiting = [kind for kind in results if wanted[kind]]  # rows come in this order, whoever is quicker
    while jobs:
        for job in scorer.workers.wait(jobs):
            kind, name = jobs.pop(job)
            results[kind][name] = job.result()
            progress(kind, len(results[kind]), wanted[kind])
        while waiting and len(results[waiting[0]]) == wanted[waiting[0]]:
            done_kind = waiting.pop(0)
            evaluations = dict(sorted(results[done_kind].items()))
            wall_s = time.monotonic() - started
            yield Baseline(name=done_kind, evaluations=evaluations, wall_s=wall_s)


def _submit(scorer: Scorer, name: str, client: str | None, effort: Effort, start: Shared) -> Job[Evaluation]:
    return scorer.workers.submit(
        train_and_score, scorer.resident.run_digest, name, client, effort, start, scorer.metrics
    )


def train_and_score(
    run_digest: str, name: str, client: str | None, effort: Effort, start: Shared, metrics: Sequence[str]
) -> Evaluation:
    """One baseline: train on one client's rows (or everyone's) from the start, then score on the test set."""
    resident = get_loaded_run(run_digest)
    clients = resident.data.clients
    own = [c.train for c in clients if client is None or c.name == client]
    section = resident.run.training.model_copy(update={"gradient_accumulation": effort.accumulation})
    state = resident.train_alone(np.concatenate(own), start.get(), section, steps=effort.steps, name=name)
    encoded, _ = rows_of(resident, TEST)
    columns = resident.score(encoded, batches_of(resident, TEST), state, metrics)
    rng = stream(resident.run.run.seed, "bootstrap")
    places = {} if own_test_set(resident.run) else places_of(test_rows_of_clients(resident), columns["index"])
    return summarise(columns, metrics, clients=places, resamples=resident.run.evaluation.bootstrap, rng=rng)


def _sample(names: Sequence[str]) -> Sequence[str]:
    if len(names) <= MOST_ALONE:
        return names
    return [names[round(place)] for place in np.linspace(0, len(names) - 1, MOST_ALONE)]
