"""Shares: what one caller may use, by a clock that is moved by hand."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import pytest

from fedpeft.errors import CredentialError, LimitError, StorageError, UpdateError
from fedpeft_server.transport.callers import ADDRESS
from fedpeft_server.transport.grpc_options import TransportOptions
from fedpeft_server.transport.rate_limits import RateLimits, TokenBucket
from fedpeft_server.transport.refusals import MAX_NAMES, NOBODY, Reason, Refusals, Refused, reason_of

OPTIONS = TransportOptions(
    calls_per_s=2.0, max_streams=3, sessions_per_minute=5, bytes_per_hour=3600, refusals_per_hour=4
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def made() -> tuple[RateLimits, Refusals, Clock]:
    book, clock = Refusals(), Clock()
    return RateLimits(OPTIONS, book, clock), book, clock


def test_a_bucket_fills_at_its_rate_and_not_beyond_its_size() -> None:
    bucket = TokenBucket(0.5, 3.0, 0.0)
    assert [bucket.take(1.0, 0.0) for _ in range(4)] == [0.0, 0.0, 0.0, 2.0]
    assert bucket.take(1.0, 1.0) == 1.0
    assert bucket.take(1.0, 2.0) == 0.0
    assert bucket.take(3.0, 1000.0) == 0.0
    assert bucket.wait_s(1.5, 1000.0) == 3.0


def test_calls_have_a_rate_and_ten_seconds_worth_at_once() -> None:
    shares, _, clock = made()
    for _ in range(20):
        with shares.call("ada"):
            pass
    with pytest.raises(Refused, match="2 calls a second") as caught, shares.call("ada"):
        pass
    assert caught.value.reason is Reason.RATE
    assert isinstance(caught.value.error, LimitError)
    with shares.call("bob"):
        pass
    clock.now = 0.5
    with shares.call("ada"):
        pass


def test_open_calls_are_counted_over_all_connections() -> None:
    shares, _, _ = made()
    with ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(shares.call("ada"))
        with pytest.raises(Refused, match="3 calls of this caller are open"), shares.call("ada"):
            pass
    with shares.call("ada"):
        pass


def test_what_speaks_against_a_caller_uses_its_share_of_refusals() -> None:
    shares, book, clock = made()
    for _ in range(10):
        shares.count("ada", Reason.STALLED, "the server's own bound")
    for _ in range(4):
        with shares.call("mallory"):
            shares.end_call("mallory", Refused(Reason.MALFORMED, UpdateError("no protobuf")))
    with shares.call("ada"):
        pass
    with pytest.raises(Refused, match="too much was refused; try again in 900 s"), shares.call("mallory"):
        pass
    clock.now = 900.0
    with shares.call("mallory"):
        pass
    assert book.of("mallory") == {"malformed": 4}
    assert book.all() == {"ada": {"stalled": 10}, "mallory": {"malformed": 4}}
    assert book.totals() == {"stalled": 10, "malformed": 4}


def test_bytes_and_sessions_have_their_shares() -> None:
    shares, _, clock = made()
    shares.bytes("ada", up=3000)
    with pytest.raises(Refused) as caught:
        shares.bytes("ada", down=601)
    assert caught.value.reason is Reason.QUOTA
    clock.now = 1.0
    shares.bytes("ada", down=601)
    assert shares.get_usage("ada") == {"calls": 0, "bytes_up": 3000, "bytes_down": 601}
    for _ in range(5):
        shares.session("ada")
    with pytest.raises(Refused, match="5 sessions a minute"):
        shares.session("ada")


def test_callers_without_a_name_are_counted_as_nobody() -> None:
    shares, book, _ = made()
    shares.count(f"{ADDRESS}ipv4:192.0.2.1", Reason.TOKEN, "not known here")
    assert book.all() == {NOBODY: {"token": 1}}


def test_the_book_stays_small_and_the_log_short(caplog: pytest.LogCaptureFixture) -> None:
    book = Refusals()
    with caplog.at_level(logging.WARNING, "fedpeft.server"):
        for _ in range(10_000):
            book.note("mallory", Reason.RATE, "two\nlines")
    assert 3 <= len(caplog.messages) <= 16
    assert all("\n" not in line for line in caplog.messages)
    logging.getLogger("fedpeft.server").setLevel(logging.ERROR)
    try:
        for number in range(MAX_NAMES + 50):
            book.note(f"agent-{number}", Reason.RATE, "")
    finally:
        logging.getLogger("fedpeft.server").setLevel(logging.NOTSET)
    assert len(book.all()) == MAX_NAMES + 1
    assert sum(book.totals().values()) == 10_000 + MAX_NAMES + 50


def test_as_what_an_error_counts() -> None:
    assert reason_of(CredentialError("x")) is Reason.CALLER
    assert reason_of(TimeoutError()) is Reason.STALLED
    assert reason_of(Refused(Reason.TOKEN, CredentialError("x"))) is Reason.TOKEN
    assert reason_of(StorageError("the disk is full")) is None
