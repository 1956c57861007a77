"""The kinds of privacy that a run file can ask for: what each charges, for whom, and whom it protects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from fedpeft.config.sections import ClientLevelPrivacy, LocalPrivacy, RecordLevelPrivacy, RunConfig
from fedpeft.config.traits import Trait, Traits
from fedpeft.errors import PrivacyError
from fedpeft.privacy.budget import FEDERATION, Budget
from fedpeft.privacy.central import sample_rate_of
from fedpeft.privacy.events import ClientLevel, Event, Local, PersonLevel, RecordLevel

KindName = Literal["client-level", "record-level", "local"]


@dataclass(frozen=True)
class Kind:
    """One kind of privacy.

    Attributes:
        summary: one line for people.
        against: whom it protects from.
        joint: one account for the whole federation; else one for each client, since their data are disjoint.
        event: what a round releases about an account, given the kind's section.
        declares: what decides which runs it can be part of, beside that it is private.
    """

    summary: str
    against: str
    joint: bool
    event: Callable[[RunConfig, Any], Event]
    declares: Traits

    @property
    def traits(self) -> Traits:
        """What it is, as `fedpeft.compatibility` asks."""
        return self.declares | {Trait.PRIVATE}


def _client_level(run: RunConfig, section: ClientLevelPrivacy) -> Event:
    rate = sample_rate_of(run.federation, max_weight=section.max_weight)
    return ClientLevel(noise_multiplier=section.noise_multiplier, sample_rate=rate)


def _record_level(run: RunConfig, section: RecordLevelPrivacy) -> Event:
    if run.training.steps is None:
        raise PrivacyError(
            "training.steps is needed under record-level privacy: epochs would make the number of releases"
            " depend on how many rows a client has"
        )
    unit = RecordLevel if run.data.user is None else PersonLevel
    return unit(
        noise_multiplier=section.noise_multiplier,
        sample_rate=section.sample_rate,
        steps=run.training.steps,
    )


def _local(run: RunConfig, section: LocalPrivacy) -> Event:
    return Local(noise_multiplier=section.noise_multiplier)


KINDS: Mapping[KindName, Kind] = MappingProxyType(
    {
        "client-level": Kind(
            "noise at the server: the models hide whether a client took part (McMahan et al. 2018)",
            "whoever sees the models or the report; the server and its operator are trusted",
            True,
            _client_level,
            frozenset({Trait.RELEASES_SUMS_ONLY, Trait.SECRET_COHORTS, Trait.ONE_RELEASE}),
        ),
        "record-level": Kind(
            "DP-SGD on each client: its updates hide any one row or person (Abadi et al. 2016)",
            "whoever sees a client's updates, the server included; each client is trusted with its rows",
            False,
            _record_level,
            frozenset({Trait.HIDES_ROWS, Trait.NOISE_ON_DEVICE}),
        ),
        "local": Kind(
            "noise on each client's update: what it sends hides what it learned",
            "whoever sees a client's messages, the server included",
            False,
            _local,
            frozenset({Trait.NOISE_ON_DEVICE, Trait.ONE_RELEASE}),
        ),
    }
)


def kind_of(run: RunConfig) -> Kind | None:
    """The kind that the run asks for; None without `[privacy]`."""
    return None if run.privacy is None else KINDS[run.privacy.kind]


def is_cohort_secret(run: RunConfig) -> bool:
    """Return whether the promise counts on nobody but the server's operator seeing whom a round asks."""
    kind = kind_of(run)
    return kind is not None and kind.joint


def event_of(run: RunConfig) -> Event:
    """What one round of a private run releases about each account that it charges.

    Raises:
        PrivacyError: the run has no `[privacy]`, or makes no promise that can be accounted for.
    """
    kind = kind_of(run)
    if kind is None:
        raise PrivacyError("the run has no [privacy] section; nothing of it is accounted for")
    return kind.event(run, run.privacy)


def budget_of(run: RunConfig) -> Budget:
    """What a private run may spend.

    Raises:
        PrivacyError: the run has no `[privacy]`.
    """
    if run.privacy is None:
        raise PrivacyError("the run has no [privacy] section, hence no budget")
    return Budget(target_delta=run.privacy.target_delta, max_epsilon=run.privacy.max_epsilon)


def accounts(run: RunConfig, asked: Sequence[str]) -> list[str]:
    """Whose accounts a round charges, given whom it asks."""
    kind = kind_of(run)
    return [FEDERATION] if kind is not None and kind.joint else sorted(asked)
