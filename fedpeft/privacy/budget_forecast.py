"""What a run will have spent at its end, and when its budget ends it: known before anything is trained."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from fedpeft.privacy.accountant import epsilon
from fedpeft.privacy.budget import Budget
from fedpeft.privacy.events import Event

MOST_ROUNDS = 1_000_000  # further than this nobody looks


@dataclass(frozen=True)
class BudgetForecast:
    """The arithmetic of a budget.

    Attributes:
        charged: rounds that the dearest account is charged for, were there no limit.
        epsilon: of those rounds, or of as many as the budget allows.
        affordable: rounds that the budget allows the dearest account; at most `MOST_ROUNDS`.
    """

    charged: int
    epsilon: float
    affordable: int

    @property
    def stops(self) -> bool:
        """Whether the budget ends the run before its last round."""
        return self.affordable < self.charged


def outlook(event: Event, budget: Budget, charged: int) -> BudgetForecast:
    """The outlook of an account that is charged `event` in so many rounds."""
    affordable = affordable_rounds(event, budget)
    return BudgetForecast(
        charged, epsilon([event] * min(charged, affordable), budget.target_delta), affordable
    )


def affordable_rounds(event: Event, budget: Budget) -> int:
    """The most rounds whose epsilon stays within the budget: epsilon grows with rounds, so bisection."""

    def beyond(rounds: int) -> bool:
        return epsilon([event] * rounds, budget.target_delta) > budget.max_epsilon

    high = 1
    while high <= MOST_ROUNDS and not beyond(high):
        high *= 2
    return bisect.bisect_left(range(min(high, MOST_ROUNDS + 1)), True, key=beyond) - 1
