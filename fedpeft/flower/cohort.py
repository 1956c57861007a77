"""Who is asked in a round, and what the virtual clock makes of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedpeft.clock import VirtualClock
from fedpeft.config import RunConfig
from fedpeft.flower.roster import Roster
from fedpeft.randomness import stream
from fedpeft.records import ClientOutcome
from fedpeft.sampling import cohort_size, sample_cohort
from fedpeft.training.steps import examples_per_round


@dataclass(frozen=True)
class Cohort:
    """One round's clients.

    Attributes:
        asked: everyone who was sampled.
        working: those whose answer will count, with their arrival in virtual seconds (0 without a clock).
        lost: outcomes of the others: vanished, or later than the deadline or the quickest of an over-selected
            cohort.
        virtual_s: when the round closes on the virtual clock; None without one.
    """

    asked: tuple[str, ...]
    working: Mapping[str, float]
    lost: tuple[ClientOutcome, ...] = ()
    virtual_s: float | None = None


def draw_cohort(run: RunConfig, roster: Roster, round_: int, *, bytes_down: int, bytes_up: int) -> Cohort:
    """Sample a round's cohort from the run's seed; with a virtual clock, decide who answers in time.

    Late clients don't train: nothing of what they would compute is used. `bytes_up` is what an update is
    expected to weigh, since its true size is known only after training.
    """
    federation, seed, names = run.federation, run.run.seed, roster.names
    rng = stream(seed, "cohort", round_)
    if federation.clock is None:
        asked = sample_cohort(federation.sampling, names, len(names), rng, 0.0)
        return Cohort(tuple(asked), dict.fromkeys(asked, 0.0))
    clock = VirtualClock(federation.clock, seed)
    present = [name for name in names if clock.available(name, round_)]
    asked = sample_cohort(federation.sampling, present, len(names), rng, federation.over_selection)
    arrivals = {}
    for name in asked:
        examples = examples_per_round(run.training, roster.members[name].examples)
        fate = clock.fate(name, round_, examples=examples, bytes_down=bytes_down, bytes_up=bytes_up)
        arrivals[name] = fate.arrives_s
    return _close(run, len(names), tuple(asked), arrivals)


def _close(run: RunConfig, total: int, asked: tuple[str, ...], arrivals: Mapping[str, float]) -> Cohort:
    """Apply the deadline and, under over-selection, keep the quickest."""
    federation = run.federation
    deadline = federation.deadline_s if federation.deadline_s is not None else math.inf
    order = sorted(asked, key=lambda name: (arrivals[name], name))
    intime = [name for name in order if arrivals[name] <= deadline and not math.isinf(arrivals[name])]
    poisson = federation.sampling.kind == "poisson"
    wanted = (
        len(asked) if poisson or not federation.over_selection else cohort_size(federation.sampling, total)
    )
    kept = intime[:wanted]
    lost = [
        ClientOutcome(client=name, status="dropped", reason="vanished after it was asked")
        if math.isinf(arrivals[name])
        else ClientOutcome(
            client=name, status="late", reason="after the round had closed", virtual_s=arrivals[name]
        )
        for name in order
        if name not in kept
    ]
    last = max((arrivals[name] for name in kept), default=0.0)
    waits = len(kept) < wanted and not math.isinf(
        deadline
    )  # someone is missing: the server waits until the deadline
    return Cohort(
        asked, {name: arrivals[name] for name in sorted(kept)}, tuple(lost), deadline if waits else last
    )
