"""What was released about whom, as frozen data: one type for each kind of protected unit.

A *multiplier* is the noise's standard deviation over the clipping bound, which is the largest length of what
one protected unit adds. Each type names its neighbouring relation, and a ledger holds events of one type
only: an epsilon for records and an epsilon for clients are promises about different things and never add up.

Every type promises Gaussian noise from `fedpeft.privacy.noise` on integers, so that
`fedpeft.privacy.accountant` is exact for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from fedpeft.errors import PrivacyError


@dataclass(frozen=True, kw_only=True)
class GaussianRelease:
    """The mathematics of an event, for the accountant: `count` Gaussian releases, Poisson-sampled.

    Attributes:
        noise_multiplier: standard deviation over the sensitivity *under the event's own relation*.
        sample_rate: chance with which the unit takes part in each release, by its own secret coin.
        count: releases of this kind.
    """

    noise_multiplier: float
    sample_rate: float
    count: int


@dataclass(frozen=True, kw_only=True)
class RecordLevel:
    """DP-SGD on one client's rows: whoever sees the client's update learns little about any one row.

    Source: Abadi et al. 2016, algorithm 1. One release per local step.

    Attributes:
        noise_multiplier: noise's standard deviation over `max_grad_norm`.
        sample_rate: chance with which each row enters a step.
        steps: local steps, the empty ones included.
    """

    kind: ClassVar[str] = "record-level"
    neighbours: ClassVar[str] = "one client's data sets that differ by adding or removing one record"

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        _check_multiplier(self.noise_multiplier, self.kind)
        _check_rate(self.sample_rate, self.kind)
        _check_count(self.steps, self.kind)

    def release(self) -> GaussianRelease:
        """One Poisson-sampled Gaussian per step; a row adds at most the bound."""
        return GaussianRelease(
            noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, count=self.steps
        )


@dataclass(frozen=True, kw_only=True)
class PersonLevel:
    """As `RecordLevel`, where a person enters a step by one coin and with one row, however many he has.

    Attributes:
        noise_multiplier: noise's standard deviation over `max_grad_norm`.
        sample_rate: chance with which each person enters a step.
        steps: local steps, the empty ones included.
    """

    kind: ClassVar[str] = "person-level"
    neighbours: ClassVar[str] = "one client's data sets that differ by adding or removing one person's rows"

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        _check_multiplier(self.noise_multiplier, self.kind)
        _check_rate(self.sample_rate, self.kind)
        _check_count(self.steps, self.kind)

    def release(self) -> GaussianRelease:
        """One Poisson-sampled Gaussian per step; a person adds at most the bound."""
        return GaussianRelease(
            noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, count=self.steps
        )


@dataclass(frozen=True, kw_only=True)
class ClientLevel:
    """Noise at the server on the sum of clipped updates: who sees the model learns little about any client.

    Source: McMahan et al. 2018, algorithm 1. One release per round, whatever travels.

    Attributes:
        noise_multiplier: noise's standard deviation over `clip_norm` (times the largest weight).
        sample_rate: chance with which each client is asked in a round; 1: all are.
        draws: how often noise was drawn over one round's cohort; more than once only after a crash.
    """

    kind: ClassVar[str] = "client-level"
    neighbours: ClassVar[str] = "federations that differ by adding or removing one client with all its rows"

    noise_multiplier: float
    sample_rate: float
    draws: int = 1

    def __post_init__(self) -> None:
        _check_multiplier(self.noise_multiplier, self.kind)
        _check_rate(self.sample_rate, self.kind)
        _check_count(self.draws, self.kind)

    def release(self) -> GaussianRelease:
        """One Poisson-sampled Gaussian.

        Several draws over one cohort tell what their mean tells, whose noise is sqrt(draws) times smaller.
        Were the cohort drawn anew as well, they would cost less: with X the likelihood ratio under one coin,
        the moments of independent ones are E[X]^draws, at most E[X^draws].
        """
        multiplier = self.noise_multiplier / math.sqrt(self.draws)
        return GaussianRelease(noise_multiplier=multiplier, sample_rate=self.sample_rate, count=1)


@dataclass(frozen=True, kw_only=True)
class Local:
    """Noise on the client before anything leaves: who sees the message learns little of what it hides.

    The sender is known, so nothing is amplified by sampling; and any two updates within the bound are
    neighbours, which are up to twice the bound apart.

    Attributes:
        noise_multiplier: noise's standard deviation over `clip_norm`.
    """

    kind: ClassVar[str] = "local"
    neighbours: ClassVar[str] = "any two updates that one client could send in place of each other"

    noise_multiplier: float

    def __post_init__(self) -> None:
        _check_multiplier(self.noise_multiplier, self.kind)

    def release(self) -> GaussianRelease:
        """One Gaussian whose sensitivity is the ball's diameter: half the multiplier."""
        return GaussianRelease(noise_multiplier=self.noise_multiplier / 2.0, sample_rate=1.0, count=1)


Event = RecordLevel | PersonLevel | ClientLevel | Local

EVENTS: dict[str, type[RecordLevel] | type[PersonLevel] | type[ClientLevel] | type[Local]] = {
    event.kind: event for event in (RecordLevel, PersonLevel, ClientLevel, Local)
}


def one_kind(events: Sequence[Event]) -> str | None:
    """The kind that all events share; None without events.

    Raises:
        PrivacyError: two kinds.
    """
    kinds = sorted({event.kind for event in events})
    if len(kinds) > 1:
        raise PrivacyError(
            f"{kinds[0]} and {kinds[1]} events came together; they protect different units and their"
            " epsilons do not add up: keep one ledger for each"
        )
    return kinds[0] if kinds else None


def event_to_plain(event: Event) -> dict[str, Any]:
    """Plain data for JSON; names kind and relation, so that a reader need not know the code."""
    return {"kind": event.kind, "neighbours": event.neighbours, **asdict(event)}


def event_from_plain(plain: Mapping[str, Any]) -> Event:
    """Read back what `event_to_plain` wrote.

    Raises:
        PrivacyError: an unknown kind, another relation than the kind's, missing or unknown keys, bad values.
    """
    values = dict(plain)
    kind, neighbours = values.pop("kind", None), values.pop("neighbours", None)
    if not isinstance(kind, str) or kind not in EVENTS:
        raise PrivacyError(f"a privacy event of kind {kind!r} came; known: {', '.join(sorted(EVENTS))}")
    event = EVENTS[kind]
    if neighbours != event.neighbours:
        raise PrivacyError(
            f"a {kind} event came with neighbours {neighbours!r}; {event.neighbours!r} is needed"
        )
    wanted = {field.name for field in fields(event)}
    if values.keys() != wanted:
        raise PrivacyError(f"a {kind} event came with {sorted(values)}; exactly {sorted(wanted)} are needed")
    return event(**values)


def _check_multiplier(value: float, kind: str) -> None:
    if not _is_number(value) or not 0.0 < value < math.inf:
        raise PrivacyError(
            f"{kind}: noise_multiplier {value!r} came; it must be positive and finite, as without noise there"
            " is no epsilon"
        )


def _check_rate(value: float, kind: str) -> None:
    if not _is_number(value) or not 0.0 < value <= 1.0:
        raise PrivacyError(f"{kind}: sample_rate {value!r} came; more than 0 and at most 1 is needed")


def _check_count(value: int, kind: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise PrivacyError(f"{kind}: {value!r} releases came; a whole number of at least 1 is needed")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
