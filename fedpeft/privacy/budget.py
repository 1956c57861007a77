"""A run's privacy budget and the ledger of what was spent of it.

The ledger is plain frozen data, committed with a round's checkpoint: charge it *before* anything of the round
is released, then commit, then release. A charge belongs to a round and a holder, the one whose data it is
about, so committing the same charge twice changes nothing, and a different charge for it is refused. One
charge pays for one draw of noise: who draws again after a crash, instead of sending the committed bytes,
charges the round anew (`BudgetLedger.recharge`), since nobody knows whether the first draw was seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedpeft.errors import PrivacyError, StateError
from fedpeft.privacy.accountant import check_delta, epsilon
from fedpeft.privacy.events import ClientLevel, Event, event_from_plain, event_to_plain, one_kind

VERSION = 1
FEDERATION = (
    "federation"  # the holder under client-level privacy, where a release is about all clients at once
)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a run may spend: epsilon at most `max_epsilon` at `target_delta`, for every holder."""

    target_delta: float
    max_epsilon: float

    def __post_init__(self) -> None:
        check_delta(self.target_delta)
        if not self.max_epsilon > 0.0:
            raise PrivacyError(f"max_epsilon {self.max_epsilon!r} came; a positive number is needed")


@dataclass(frozen=True)
class Charge:
    """What one round released about one holder's data."""

    round: int
    holder: str
    events: tuple[Event, ...]


@dataclass(frozen=True)
class Spending:
    """Epsilon of the holder who spent most, before and after a round."""

    before: float
    after: float
    holder: str | None


@dataclass(frozen=True)
class BudgetLedger:
    """All charges of a run, at most one per round and holder; every change is a new ledger.

    Holders are the clients under record-level and local privacy (their data are disjoint, so the run's
    epsilon is the largest of theirs) and `FEDERATION` under client-level privacy.
    """

    charges: Mapping[tuple[int, str], tuple[Event, ...]] = field(default_factory=dict)

    @property
    def kind(self) -> str | None:
        """The kind of all events; None while nothing is spent."""
        return one_kind([event for events in self.charges.values() for event in events])

    def events(self, holder: str) -> list[Event]:
        """Everything released about a holder, by round."""
        return [
            event
            for (_, who), events in sorted(self.charges.items(), key=lambda item: item[0])
            if who == holder
            for event in events
        ]

    @property
    def last_round(self) -> int:
        """The last round that anything was charged for, released or not; 0 before the first."""
        return max((round_ for round_, _ in self.charges), default=0)

    @property
    def holders(self) -> list[str]:
        """Who has spent anything, sorted."""
        return sorted({holder for _, holder in self.charges})

    def epsilon(self, target_delta: float) -> float:
        """Epsilon so far, of the holder who spent most."""
        return self._dearest(target_delta)[0]

    def epsilon_of_cohort(self, target_delta: float) -> float:
        """Return epsilon so far against whoever sees whom rounds asked, for a client asked in all of them.

        No coin hides who takes part from such an observer, so nothing is amplified: the sample rate is 1.
        """
        return epsilon(with_cohort_known(self.events(FEDERATION)), target_delta)

    def charge(self, charges: Sequence[Charge]) -> BudgetLedger:
        """The ledger with these charges; a charge that it holds already changes nothing.

        Raises:
            PrivacyError: a charge for a round and holder already charged with other events, or a round before
                one that is charged, or events of another kind.
        """
        held, last = dict(self.charges), self.last_round
        for charge in charges:
            key = (charge.round, charge.holder)
            if held.get(key, charge.events) != charge.events:
                raise PrivacyError(
                    f"round {charge.round} of {charge.holder!r} is charged already, with other events; a"
                    " round is released once: continue from the committed state, or start a new run"
                )
            if charge.round < max(last, 1) and key not in held:
                raise PrivacyError(
                    f"a charge for round {charge.round} came and round {last} is charged already; rounds are"
                    " charged in order, from 1"
                )
            held[key] = charge.events
        one_kind([event for events in held.values() for event in events])
        return replace(self, charges=held)

    def recharge(self, round_: int, holders: Sequence[str], event: Event) -> BudgetLedger:
        """The ledger with one more attempt at a round that may have released something before it was cut off.

        Under client-level privacy the attempts share a cohort, hence they are one event of several draws;
        elsewhere each attempt is a release of its own.

        Raises:
            PrivacyError: an event of another kind.
        """
        held = dict(self.charges)
        for holder in holders:
            before = held.get((round_, holder), ())
            held[round_, holder] = _one_more(before, event)
        one_kind([event for events in held.values() for event in events])
        return replace(self, charges=held)

    def dry_run(self, after: BudgetLedger, target_delta: float) -> Spending:
        """What it would cost to go on from this ledger to `after`."""
        cost, holder = after._dearest(target_delta)
        return Spending(before=self.epsilon(target_delta), after=cost, holder=holder)

    def spend(self, charges: Sequence[Charge], budget: Budget) -> tuple[BudgetLedger, Spending]:
        """Dry-run the next round and charge it if the budget allows; call it before the round begins.

        Returns:
            The ledger to commit, and the epsilons to print.

        Raises:
            PrivacyError: the budget would be exceeded, or as `charge`. This ledger is unchanged either way.
        """
        after = self.charge(charges)
        spending = self.dry_run(after, budget.target_delta)
        if spending.after > budget.max_epsilon:
            round_ = max((charge.round for charge in charges), default=0)
            raise PrivacyError(
                f"round {round_} would take {spending.holder!r} to epsilon {spending.after:.4g} at delta"
                f" {budget.target_delta:g}; the budget is {budget.max_epsilon:g} and {spending.before:.4g} is"
                " spent:"
                " the run stops here; raise privacy.noise_multiplier in a new run, or ask for fewer rounds"
            )
        return after, spending

    def to_json(self) -> str:
        """One line of JSON; equal events are written once."""
        known: dict[Event, int] = {}
        rows = [
            [round_, holder, [known.setdefault(event, len(known)) for event in events]]
            for (round_, holder), events in sorted(self.charges.items(), key=lambda item: item[0])
        ]
        plain = {"version": VERSION, "events": [event_to_plain(event) for event in known], "charges": rows}
        return json.dumps(plain, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> BudgetLedger:
        """Read back what `to_json` wrote.

        Raises:
            StateError: not such a text; a damaged ledger is never taken for an empty one.
        """
        try:
            return cls(_read(json.loads(text)))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, PrivacyError) as error:
            raise StateError(
                f"the ledger of spent privacy cannot be read ({error}); restore the checkpoint it belongs to,"
                " and do not go on without it"
            ) from error

    def _dearest(self, target_delta: float) -> tuple[float, str | None]:
        """The largest epsilon and whose it is; holders with equal events are costed once."""
        by_holder: dict[str, list[Event]] = {}
        for (_, holder), events in sorted(self.charges.items(), key=lambda item: item[0]):
            by_holder.setdefault(holder, []).extend(events)
        alike: dict[tuple[Event, ...], str] = {}
        for holder, spent in sorted(by_holder.items()):
            alike.setdefault(tuple(spent), holder)
        costs = [(epsilon(spent, target_delta), holder) for spent, holder in alike.items()]
        return max(costs, key=lambda cost: cost[0], default=(0.0, None))


def with_cohort_known(events: Sequence[Event]) -> list[Event]:
    """Return the events as they are for whoever sees cohorts; those that sample none unchanged."""
    return [replace(event, sample_rate=1.0) if isinstance(event, ClientLevel) else event for event in events]


def _one_more(before: tuple[Event, ...], event: Event) -> tuple[Event, ...]:
    if not isinstance(event, ClientLevel):
        return (*before, event)
    draws = sum(earlier.draws for earlier in before if isinstance(earlier, ClientLevel))
    return (replace(event, draws=draws + event.draws),)


def _read(plain: Mapping[str, Any]) -> dict[tuple[int, str], tuple[Event, ...]]:
    if plain["version"] != VERSION:
        raise ValueError(f"version {plain['version']!r}, known is {VERSION}")
    known = [event_from_plain(item) for item in plain["events"]]
    charges: dict[tuple[int, str], tuple[Event, ...]] = {}
    for round_, holder, indices in plain["charges"]:
        if (
            not isinstance(round_, int)
            or not isinstance(holder, str)
            or round_ < 1
            or (round_, holder) in charges
        ):
            raise ValueError(f"a charge for round {round_!r} of {holder!r}")
        if not all(isinstance(index, int) and 0 <= index < len(known) for index in indices):
            raise ValueError(f"round {round_} names unknown events")
        charges[round_, holder] = tuple(known[index] for index in indices)
    one_kind(known)
    return charges
