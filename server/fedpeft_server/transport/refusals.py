"""What was refused, to whom and why: counted for people and for whoever measures the server."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum

from fedpeft.errors import CredentialError, FedPEFTError

LOG = logging.getLogger("fedpeft.server")
NOBODY = ""  # callers without a name that can be believed
MAX_NAMES = 8192  # callers that are told apart; names beyond are counted together, as nobody's
_SAID = 3  # lines in the log for one caller and reason; then each time that the count has doubled


class Reason(StrEnum):
    """Why something was refused.

    `ours` are the server's own bounds: a caller that meets them did nothing that only a hostile one does.
    """

    CALLER = "caller"  # no certificate, another's name, not the role, revoked, expired
    TOKEN = "token"  # unknown, spent, expired
    MALFORMED = "malformed"  # no protobuf, or not what comes at this point
    TOO_LARGE = "too-large"  # a message, or what one announces
    CHANGED = "changed"  # bytes that are not those announced
    SIGNATURE = "signature"  # not by the caller, or over another run, round or body
    UPDATE = "update"  # an update of the wrong shape, run or round, or not finite
    NOT_ASKED = "not-asked"  # nobody waits for it: repeated, or never asked
    SPARE = "spare"  # late: its round had enough others, or its time was over
    STORED = "stored"  # another result was accepted before, or its round is closed
    STALLED = "stalled"  # neither read nor sent for too long
    BROKEN_OFF = "broken-off"  # ended in the middle: a lost network, or a message that gRPC itself refused
    RATE = "rate"  # too often
    TWICE = "twice"  # a second machine with the key of an agent that is connected and answers
    STREAMS = "streams"  # too many at a time
    TURN = "turn-over"  # others waited for the place, and what it was at goes on later
    QUOTA = "quota"  # too many bytes, or too much of the above
    FULL = "full"  # the server has as many agents as it takes

    @property
    def ours(self) -> bool:
        """Whether it says nothing against the caller."""
        return self in _OURS


_OURS = frozenset(
    {
        Reason.NOT_ASKED,
        Reason.SPARE,
        Reason.STORED,
        Reason.STALLED,
        Reason.BROKEN_OFF,
        Reason.RATE,
        Reason.TWICE,
        Reason.STREAMS,
        Reason.TURN,
        Reason.QUOTA,
        Reason.FULL,
    }
)


class Refused(Exception):  # noqa: N818 - carries an error and why it counts
    """Something is refused, for a reason that is counted where the call ends."""

    def __init__(self, reason: Reason, error: FedPEFTError) -> None:
        super().__init__(str(error))
        self.reason, self.error = reason, error


def reason_of(error: BaseException) -> Reason | None:
    """As what an error counts that ends a call; None: it says nothing of the caller, such as a full disk."""
    if isinstance(error, Refused):
        return error.reason
    if isinstance(error, CredentialError):
        return Reason.CALLER
    return Reason.STALLED if isinstance(error, TimeoutError) else None


class Refusals:
    """Counts since the start of the server, by caller and reason. Any thread may use it; it stays small."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[Reason]] = {}

    def note(self, name: str, reason: Reason, detail: str) -> None:
        """Count one refusal of `name`, and say so in the log, the first times and then ever more rarely."""
        with self._lock:
            known = name if name in self._counts or len(self._counts) < MAX_NAMES else NOBODY
            counts = self._counts.setdefault(known, Counter())
            counts[reason] += 1
            count = counts[reason]
        if count <= _SAID or count.bit_count() == 1:
            line = " ".join(detail.split())[:500]
            LOG.log(
                logging.INFO if reason is Reason.SPARE else logging.WARNING,
                "refused %s: %s: %s (%d so far)",
                known or "a caller without a name",
                reason,
                line,
                count,
                extra={"agent": known, "reason": str(reason), "count": count},
            )

    def of(self, name: str) -> Mapping[str, int]:
        """One caller's counts by reason."""
        with self._lock:
            return {str(reason): count for reason, count in sorted(self._counts.get(name, {}).items())}

    def all(self) -> Mapping[str, Mapping[str, int]]:
        """By caller, then by reason; callers without a name are under the empty one."""
        with self._lock:
            names = sorted(self._counts)
        return {name: self.of(name) for name in names}

    def totals(self) -> Mapping[str, int]:
        """By reason."""
        with self._lock:
            total = sum(self._counts.values(), Counter())
        return {str(reason): count for reason, count in sorted(total.items())}
