"""Who is asked in a round: what a round that was opened is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedpeft.ledger.records import ClientOutcome


@dataclass(frozen=True)
class Cohort:
    """One round's clients.

    Attributes:
        asked: everyone who was sampled.
        working: those whose answer will count, with their arrival in virtual seconds (0 without a clock).
            Where `places` is set: those whose answer may.
        lost: outcomes of the others: vanished, or later than the deadline or the quickest of an over-selected
            cohort.
        virtual_s: when the round closes on the virtual clock; None without one.
        places: the round closes with so many sound answers, the first to come; None: it waits for everyone.
    """

    asked: tuple[str, ...]
    working: Mapping[str, float]
    lost: tuple[ClientOutcome, ...] = ()
    virtual_s: float | None = None
    places: int | None = None

    def quorum(self, share: float) -> int:
        """How many must answer: a share of those who were asked, and never more than can count."""
        needed = math.ceil(share * len(self.asked))
        return needed if self.places is None else min(needed, self.places)
