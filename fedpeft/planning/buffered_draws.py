"""Who a run in mode 'buffered' will ask, and how old its updates will be, drawn as its rounds will draw."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from fedpeft.config.sections import ClockSection, RunConfig
from fedpeft.ledger import Cohort
from fedpeft.ledger.records import ClientOutcome
from fedpeft.rounds.buffered.in_flight import InFlightTasks, buffer_of
from fedpeft.transport.roster import Roster


@dataclass(frozen=True)
class BufferedPlan:
    """What the buffer makes of the clients' speeds.

    Attributes:
        size: updates of one round.
        concurrency: clients at work at a time.
        max_staleness: rounds; older work is given up.
        weight: name of the staleness weight.
        staleness: entry s counts the updates of staleness s, in all rounds that were drawn.
        equal_speeds: there is no virtual clock, so all clients were taken to be equally quick.
    """

    size: int
    concurrency: int
    max_staleness: int
    weight: str
    staleness: tuple[int, ...]
    equal_speeds: bool

    @property
    def mean_staleness(self) -> float:
        """Over all updates."""
        total = sum(self.staleness)
        return sum(age * count for age, count in enumerate(self.staleness)) / total if total else 0.0


def draw_buffered(
    run: RunConfig, roster: Roster, rounds: int, *, bytes_down: int, bytes_up: int
) -> tuple[list[Cohort], BufferedPlan, list[str]]:
    """Let the clock run without anyone training.

    Returns:
        For each round those who were asked in it, those whose updates it counts and those that are lost; the
        plan; and what will stop the run.

    Raises:
        FederationError: more clients are wanted than there are.
    """
    clock = run.federation.clock
    section = buffer_of(run)
    federation = run.federation.model_copy(update={"clock": clock or ClockSection()})
    flights = InFlightTasks(run.model_copy(update={"federation": federation}), roster, {})
    cohorts: list[Cohort] = []
    ages: Counter[int] = Counter()
    problems: list[str] = []
    needed = math.ceil(run.federation.quorum * section.size)
    for number in range(1, rounds + 1):
        began_s = flights.now_s
        lost = [outcome for _, outcome in flights.open(number)]
        asked: list[str] = []
        working: dict[str, float] = {}
        while len(working) < section.size:
            asked += [flight.client for flight in flights.fill(lambda _: bytes_down, bytes_up)]
            flight = flights.next_by_clock()
            if flight is None:
                break
            answers = flights.answers(flight)
            known = (
                ClientOutcome(client=flight.client, status="folded") if answers else flights.overdue(flight)
            )
            outcome = flights.land(flight, known)
            if answers:
                working[flight.client] = outcome.virtual_s or 0.0
                ages[outcome.staleness or 0] += 1
            else:
                lost.append(outcome)
        length_s = None if clock is None else flights.now_s - began_s
        cohorts.append(Cohort(tuple(asked), working, tuple(lost), length_s))
        if len(working) < needed:
            problems.append(
                f"federation.quorum: round {number} would end with {len(working)} of {section.size} updates,"
                " since all who are at work have vanished; set federation.deadline_s, or raise"
                " federation.buffer.concurrency"
            )
            break
    counts = tuple(ages[age] for age in range(max(ages) + 1)) if ages else ()
    plan = BufferedPlan(
        section.size,
        section.concurrency,
        section.max_staleness,
        section.staleness_weight.kind,
        counts,
        clock is None,
    )
    return cohorts, plan, problems
