"""Events: kinds that cannot be confused, and their plain form."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import PrivacyError
from fedpeft.privacy.events import (
    EVENTS,
    ClientLevel,
    Event,
    Local,
    PersonLevel,
    RecordLevel,
    event_from_plain,
    event_to_plain,
    one_kind,
)

MULTIPLIERS = st.floats(1e-3, 1e3)
RATES = st.floats(1e-6, 1.0)
ANY: st.SearchStrategy[Event] = st.one_of(
    st.builds(RecordLevel, noise_multiplier=MULTIPLIERS, sample_rate=RATES, steps=st.integers(1, 10**6)),
    st.builds(PersonLevel, noise_multiplier=MULTIPLIERS, sample_rate=RATES, steps=st.integers(1, 10**6)),
    st.builds(ClientLevel, noise_multiplier=MULTIPLIERS, sample_rate=RATES, draws=st.integers(1, 9)),
    st.builds(Local, noise_multiplier=MULTIPLIERS),
)


def test_every_kind_has_its_own_relation() -> None:
    assert EVENTS.keys() == {"record-level", "person-level", "client-level", "local"}
    assert len({event.neighbours for event in EVENTS.values()}) == 4


def test_events_are_frozen_and_equal_numbers_of_two_kinds_differ() -> None:
    event = ClientLevel(noise_multiplier=1.0, sample_rate=0.5)
    with pytest.raises(FrozenInstanceError):
        event.sample_rate = 1.0  # type: ignore[misc]  # the point of the test
    other: object = RecordLevel(noise_multiplier=1.0, sample_rate=0.5, steps=1)
    assert event != other


@given(ANY)
def test_the_plain_form_survives_json(event: Event) -> None:
    assert event_from_plain(json.loads(json.dumps(event_to_plain(event)))) == event


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "global"}, "kind 'global'"),
        ({"kind": None}, "kind None"),
        ({"neighbours": "replace one record"}, "neighbours"),
        ({"noise": 1}, "exactly"),
        ({"noise_multiplier": 0.0}, "positive"),
        ({"noise_multiplier": float("nan")}, "positive"),
        ({"noise_multiplier": True}, "positive"),
        ({"sample_rate": 1.5}, "at most 1"),
        ({"sample_rate": 0.0}, "more than 0"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 1.5}, "whole number"),
    ],
)
def test_damaged_events_are_refused(change: dict[str, Any], says: str) -> None:
    plain = event_to_plain(RecordLevel(noise_multiplier=1.0, sample_rate=0.1, steps=3)) | change
    with pytest.raises(PrivacyError, match=says) as caught:
        event_from_plain(plain)
    assert "\n" not in str(caught.value)


def test_kinds_do_not_mix() -> None:
    client, local = ClientLevel(noise_multiplier=1.0, sample_rate=1.0), Local(noise_multiplier=1.0)
    assert one_kind([client, client]) == "client-level"
    assert one_kind([]) is None
    with pytest.raises(PrivacyError, match="do not add up"):
        one_kind([client, local])


def test_local_privacy_counts_the_whole_diameter() -> None:
    assert Local(noise_multiplier=3.0).release().noise_multiplier == 1.5
    assert ClientLevel(noise_multiplier=3.0, sample_rate=1.0).release().noise_multiplier == 3.0
