"""What a private run will have spent, before it spends anything."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fedpeft.config.sections import RunConfig
from fedpeft.errors import PrivacyError
from fedpeft.planning.draws import RoundsPlan
from fedpeft.privacy.accountant import epsilon, noise_multiplier_for
from fedpeft.privacy.budget import Budget, with_cohort_known
from fedpeft.privacy.budget_forecast import MOST_ROUNDS, BudgetForecast, outlook
from fedpeft.privacy.events import Event
from fedpeft.privacy.kinds import budget_of, event_of, kind_of


@dataclass(frozen=True)
class PrivacyPlan:
    """A run's promise and its price.

    Attributes:
        kind: of the events that are charged; "none" without `[privacy]`.
        neighbours: what epsilon is about.
        against: whom it protects from.
        target_delta: beside which epsilon is to be read.
        max_epsilon: the budget.
        epsilon: at the end of the run, of the account that spends most.
        epsilon_cohort: the same against whoever sees secret cohorts; None where there are none.
        charged_rounds: in which that account is charged, if the budget lasts.
        affordable_rounds: of such rounds, how many the budget allows; None: more than anybody will hold.
        noise_multiplier: the run's.
        needed_multiplier: the smallest with which the budget lasts for all charged rounds; None if none does.
        stops: the budget ends the run early.
        seeded: the noise is not secret, and the run not private.
    """

    kind: str
    neighbours: str = ""
    against: str = ""
    target_delta: float | None = None
    max_epsilon: float | None = None
    epsilon: float | None = None
    epsilon_cohort: float | None = None
    charged_rounds: int = 0
    affordable_rounds: int | None = None
    noise_multiplier: float | None = None
    needed_multiplier: float | None = None
    stops: bool = False
    seeded: bool = False


def plan_privacy(run: RunConfig, rounds: RoundsPlan | None) -> PrivacyPlan:
    """The plan of a run's privacy.

    Args:
        rounds: who will be asked how often; None if that could not be drawn, as if all were asked always.

    Raises:
        PrivacyError: a promise that cannot be accounted for.
    """
    kind = kind_of(run)
    if run.privacy is None or kind is None:
        return PrivacyPlan("none")
    charged = run.run.rounds
    if not kind.joint and rounds is not None:
        charged = math.ceil(rounds.asked_per_client.most)
    event, budget = event_of(run), budget_of(run)
    seen: BudgetForecast = outlook(event, budget, charged)
    return PrivacyPlan(
        kind=event.kind,
        neighbours=event.neighbours,
        against=kind.against,
        target_delta=budget.target_delta,
        max_epsilon=budget.max_epsilon,
        epsilon=seen.epsilon,
        epsilon_cohort=_get_known_cohort(event, budget, min(charged, seen.affordable))
        if kind.joint
        else None,
        charged_rounds=charged,
        affordable_rounds=seen.affordable if seen.affordable < MOST_ROUNDS else None,
        noise_multiplier=run.privacy.noise_multiplier,
        needed_multiplier=_find_needed(event, budget, charged),
        stops=seen.stops,
        seeded=run.privacy.seeded,
    )


def _get_known_cohort(event: Event, budget: Budget, rounds: int) -> float:
    return epsilon(with_cohort_known([event]) * rounds, budget.target_delta)


def _find_needed(event: Event, budget: Budget, charged: int) -> float | None:
    try:
        return noise_multiplier_for(
            budget.max_epsilon,
            budget.target_delta,
            lambda multiplier: [replace(event, noise_multiplier=multiplier)] * charged,
        )
    except PrivacyError:
        return None
