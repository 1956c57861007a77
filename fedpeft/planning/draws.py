"""Who a run will ask, drawn exactly as its rounds will draw: from the run's seed, with its virtual clock.

Under client-level privacy the rounds draw by secret coins, and what is drawn here is only alike.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from fedpeft.config.sections import ClientLevelPrivacy, RunConfig
from fedpeft.ledger import Cohort
from fedpeft.planning.buffered_draws import BufferedPlan, draw_buffered
from fedpeft.rounds.cohort_draw import draw_cohort
from fedpeft.rounds.strategy_table import RULES
from fedpeft.training.steps import examples_per_round, local_steps
from fedpeft.transport.roster import Member, Roster

MOST_DRAWS = 200_000  # client-rounds on the virtual clock; drawing takes about 50 microseconds each
_MOST_NAMED = 3


@dataclass(frozen=True)
class DrawSpread:
    """The least, the middle and the most of some numbers."""

    least: float
    mean: float
    most: float


@dataclass(frozen=True)
class RoundsPlan:
    """The arithmetic of rounds and cohorts.

    Attributes:
        rounds: of the run.
        drawn_rounds: how many of them were drawn; fewer than `rounds` only for large runs on a virtual clock,
            whose totals are then scaled up.
        clients: of the run.
        asked_per_round: clients sampled and sent a task.
        asked_per_client: rounds in which a client is sent a task, whatever becomes of its answer.
        participations_per_client: rounds in which a client's answer counts.
        steps_per_client_round: local optimiser steps that one participation takes.
        steps: local optimiser steps of all clients in all rounds.
        examples: rows that all clients read in all rounds, counted as often as they are read.
        exchanges: tasks that are trained and sent back, all rounds.
        lost: share of the asked clients that vanish or come too late; 0 without a virtual clock.
        round_s: length of a round in virtual seconds; None without a virtual clock.
        run_s: length of all rounds in virtual seconds; None without one.
        buffered: what mode 'buffered' makes of it; None in synchronous rounds.
        places: answers that close a round of an over-selected cohort; None: it is not one. Without a virtual
            clock all are taken to train to the end, though most of those without a place are stopped before.
    """

    rounds: int
    drawn_rounds: int
    clients: int
    asked_per_round: DrawSpread
    asked_per_client: DrawSpread
    participations_per_client: DrawSpread
    steps_per_client_round: DrawSpread
    steps: int
    examples: int
    exchanges: int
    lost: float
    round_s: DrawSpread | None
    run_s: float | None
    buffered: BufferedPlan | None = None
    places: int | None = None


def spread(values: list[float] | list[int]) -> DrawSpread:
    """Least, mean and most of at least one number."""
    return DrawSpread(min(values), fmean(values), max(values))


def draw_rounds(
    run: RunConfig, rows: Mapping[str, int], *, bytes_down: int, bytes_up: int
) -> tuple[RoundsPlan, list[str]]:
    """Draw the cohorts of a run and add up what they do.

    Args:
        run: the run.
        rows: training rows by client.
        bytes_down: of the state that a client gets each round.
        bytes_up: of its update; both matter to the virtual clock only.

    Returns:
        The arithmetic, and one line for each way in which a round is bound to fail.

    Raises:
        FederationError: the cohort is larger than the number of clients.
    """
    rounds = run.run.rounds
    roster = Roster({name: Member(node, count) for node, (name, count) in enumerate(rows.items())}, "")
    cohorts, buffered, problems = _draw(run, roster, bytes_down, bytes_up)
    drawn = len(cohorts)
    turns = Counter(name for cohort in cohorts for name in cohort.working)
    tasks = Counter(name for cohort in cohorts for name in cohort.asked)
    scale = rounds / drawn
    trainings = {name: run.of_client(name).training for name in rows}
    working = {name: count for name, count in rows.items() if trainings[name].kind != "none"}
    idle = dict.fromkeys(rows, 0)
    steps = idle | {name: local_steps(trainings[name], count) for name, count in working.items()}
    reads = idle | {name: examples_per_round(trainings[name], count) for name, count in working.items()}
    asked = sum(len(cohort.asked) for cohort in cohorts)
    lost = sum(len(cohort.lost) for cohort in cohorts)
    lengths = [cohort.virtual_s for cohort in cohorts if cohort.virtual_s is not None]
    plan = RoundsPlan(
        rounds=rounds,
        drawn_rounds=drawn,
        clients=len(rows),
        asked_per_round=spread([len(cohort.asked) for cohort in cohorts]),
        asked_per_client=spread([tasks[name] * scale for name in rows]),
        participations_per_client=spread([turns[name] * scale for name in rows]),
        steps_per_client_round=spread(list(steps.values())),
        steps=round(scale * sum(steps[name] * count for name, count in turns.items())),
        examples=round(scale * sum(reads[name] * count for name, count in turns.items())),
        exchanges=round(scale * sum(turns.values())),
        lost=lost / (lost + sum(turns.values())) if asked else 0.0,
        round_s=spread(lengths) if lengths else None,
        run_s=scale * math.fsum(lengths) if lengths else None,
        buffered=buffered,
        places=cohorts[0].places,
    )
    return plan, problems


def _draw(
    run: RunConfig, roster: Roster, bytes_down: int, bytes_up: int
) -> tuple[list[Cohort], BufferedPlan | None, list[str]]:
    """The cohorts of the first rounds, and what will stop the run."""
    rounds, federation = run.run.rounds, run.federation
    if federation.buffer is not None:
        drawn = min(rounds, max(1, MOST_DRAWS // (4 * federation.buffer.size)))
        return draw_buffered(run, roster, drawn, bytes_down=bytes_down, bytes_up=bytes_up)
    drawn = rounds if federation.clock is None else min(rounds, max(1, MOST_DRAWS // len(roster.members)))
    cohorts = [
        draw_cohort(run, roster, number, bytes_down=lambda _: bytes_down, bytes_up=bytes_up)
        for number in range(1, drawn + 1)
    ]
    return cohorts, None, _round_problems(run, cohorts)


def _round_problems(run: RunConfig, cohorts: list[Cohort]) -> list[str]:
    """Rounds that will stop the run: no quorum, or too few answers for a rule that compares them."""
    federation = run.federation
    if isinstance(run.privacy, ClientLevelPrivacy):  # its noised sum is released whoever came
        return []
    rule = RULES.get(federation.strategy.kind)
    needed = 0 if rule is None or rule.folds else rule.needs(federation.strategy.options)
    without_quorum, too_few = [], []
    for number, cohort in enumerate(cohorts, start=1):
        answers = len(cohort.working)
        if answers < cohort.quorum(federation.quorum):
            without_quorum.append(f"round {number} ({answers} of {len(cohort.asked)})")
        elif 0 < answers < needed:
            too_few.append(f"round {number} ({answers})")
    problems = []
    if without_quorum:
        problems.append(
            f"federation.quorum: {_some(without_quorum)} would not reach {federation.quorum:g} of the asked "
            "clients; raise federation.deadline_s or over_selection, or lower federation.quorum"
        )
    if too_few:
        problems.append(
            f"federation.strategy: {federation.strategy.kind} needs {needed} updates, and {_some(too_few)} "
            "would bring fewer; lower num_malicious_nodes, or ask more clients"
        )
    return problems


def _some(rounds: list[str]) -> str:
    more = len(rounds) - _MOST_NAMED
    return ", ".join(rounds[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
