"""One caller's share of the server: how often, how much at a time, how many bytes, how much that is refused.

A share is a bucket that fills at a steady rate and holds some minutes' worth, so that bursts pass and floods
don't. All of it is arithmetic on a handful of numbers per caller, done on the event loop.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import grpc

from fedpeft.errors import LimitError
from fedpeft_server.transport.callers import ADDRESS
from fedpeft_server.transport.grpc_options import TransportOptions
from fedpeft_server.transport.grpc_statuses import status_of
from fedpeft_server.transport.refusals import NOBODY, Reason, Refusals, Refused, reason_of

BURST_S = 10.0  # of calls and messages: so many seconds' worth may come at once
MINUTE_S, HOUR_S = 60.0, 3600.0


class TokenBucket:
    """Tokens that come at `rate` per second, `size` at most.

    Source: the token bucket of traffic shaping (J. Turner, "New directions in communications", 1986).
    """

    __slots__ = ("_at", "_held", "_rate", "_size")

    def __init__(self, rate: float, size: float, now: float) -> None:
        self._rate, self._size, self._held, self._at = rate, size, size, now

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until so many tokens are there; 0: they are."""
        self._held = min(self._size, self._held + (now - self._at) * self._rate)
        self._at = now
        return max(0.0, (amount - self._held) / self._rate)

    def take(self, amount: float, now: float) -> float:
        """Take tokens if they are there: 0, or the seconds until they are, and then none are taken."""
        wait_s = self.wait_s(amount, now)
        if not wait_s:
            self._held -= amount
        return wait_s


class _Share:
    """One caller's buckets, and what it has under way."""

    def __init__(self, options: TransportOptions, now: float) -> None:
        self.open = 0
        self.calls_made = 0
        self.bytes_up = 0
        self.bytes_down = 0
        self.calls = TokenBucket(options.calls_per_s, BURST_S * options.calls_per_s, now)
        self.messages = TokenBucket(options.messages_per_s, BURST_S * options.messages_per_s, now)
        self.sessions = TokenBucket(options.sessions_per_minute / MINUTE_S, options.sessions_per_minute, now)
        self.bytes = TokenBucket(options.bytes_per_hour / HOUR_S, options.bytes_per_hour, now)
        self.refusals = TokenBucket(options.refusals_per_hour / HOUR_S, options.refusals_per_hour, now)


class RateLimits:
    """All callers' shares; on the event loop, except the book.

    Attributes:
        book: what was refused.

    Args:
        clock: seconds that never go back.
    """

    def __init__(
        self, options: TransportOptions, book: Refusals, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._options, self.book, self._clock = options, book, clock
        self._shares: OrderedDict[str, _Share] = OrderedDict()

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """One call, for as long as it lasts.

        Raises:
            Refused: calls come too often, too many are open, or too much was refused lately.
        """
        share = self._of(name)
        self._admit(Reason.QUOTA, share.refusals.wait_s(1.0, self._clock()), "too much was refused")
        self._spend(name, share.calls, 1.0, Reason.RATE, f"{self._options.calls_per_s:g} calls a second")
        if share.open >= self._options.max_streams:
            raise Refused(
                Reason.STREAMS,
                LimitError(f"{share.open} calls of this caller are open, which is the most; end one first"),
            )
        share.open += 1
        share.calls_made += 1
        try:
            yield
        finally:
            share.open -= 1

    def session(self, name: str) -> None:
        """A session begins; raises as `call`."""
        rate = self._options.sessions_per_minute
        self._spend(name, self._of(name).sessions, 1.0, Reason.RATE, f"{rate} sessions a minute")

    def message(self, name: str) -> None:
        """A message came in a session; raises as `call`."""
        rate = self._options.messages_per_s
        self._spend(name, self._of(name).messages, 1.0, Reason.RATE, f"{rate:g} messages a second")

    def bytes(self, name: str, *, up: int = 0, down: int = 0) -> None:
        """Bytes of bodies are about to move; raises as `call`."""
        share = self._of(name)
        most = f"{self._options.bytes_per_hour >> 20} MiB an hour"
        self._spend(name, share.bytes, up + down, Reason.QUOTA, most)
        share.bytes_up += up
        share.bytes_down += down

    def end_call(self, name: str, error: BaseException) -> tuple[grpc.StatusCode, str]:
        """How a call ends with an error; counts it if it is a refusal."""
        code, details = status_of(error)
        reason = reason_of(error)
        if reason is not None:
            self.count(name, reason, details)
        return code, details

    def count(self, name: str, reason: Reason, detail: str) -> None:
        """Count a refusal that ends no call."""
        self.book.note(NOBODY if name.startswith(ADDRESS) else name, reason, detail)
        self.charge_refusal(name, reason)

    def charge_refusal(self, name: str, reason: Reason) -> None:
        """A refusal was counted: if it speaks against the caller, it uses the caller's share of them."""
        if not reason.ours and name != NOBODY:
            self._of(name).refusals.take(1.0, self._clock())

    def get_usage(self, name: str) -> dict[str, int]:
        """Calls, bytes up and bytes down of a caller since the start."""
        share = self._shares.get(name) or _Share(self._options, 0.0)
        return {"calls": share.calls_made, "bytes_up": share.bytes_up, "bytes_down": share.bytes_down}

    def _of(self, name: str) -> _Share:
        share = self._shares.get(name)
        if share is None:
            share = self._shares[name] = _Share(self._options, self._clock())
            self._forget()
        self._shares.move_to_end(name)
        return share

    def _forget(self) -> None:
        """Whoever has nothing under way and was not heard of for longest goes, when there are too many."""
        while len(self._shares) > 2 * self._options.max_sessions:
            idle = next((name for name, share in self._shares.items() if not share.open), None)
            if idle is None:
                return
            del self._shares[idle]

    def _spend(self, name: str, bucket: TokenBucket, amount: float, reason: Reason, most: str) -> None:
        self._admit(reason, bucket.take(amount, self._clock()), f"{most} are accepted of one caller")

    def _admit(self, reason: Reason, wait_s: float, why: str) -> None:
        if wait_s > 0:
            raise Refused(reason, LimitError(f"{why}; try again in {math.ceil(wait_s)} s"))
