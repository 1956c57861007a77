"""Who is asked in a round: what a round that was opened is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedpeft.records import ClientOutcome


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
