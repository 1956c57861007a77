"""What may keep a run from going on: people who stop it, the server that ends, a clock that jumps."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from flwr.app import Message
from flwr.serverapp import Grid

from fedpeft.errors import UsageError
from fedpeft.transport.message_exchange import Cancels, Spares
from fedpeft.transport.polled_grid import PolledGrid

TOLERANCE_S = 5.0


class Halt(Exception):  # noqa: N818 - not an error: what it carries out was asked for
    """The run's thread is to leave the run; everything durable stays."""


class Stopped(Halt):
    """A person ended the run, with a reason."""


class Draining(Halt):
    """The server ends; the run goes on after its next start."""


class Paused(Halt):
    """Something outside the run is in the way; the run is to be tried again."""


class ProcessLostError(Paused):
    """The process that held the run's model died, or was ended for what it took; twice is too often."""


@dataclass
class Losses:
    """Lost processes since a run came on by a round."""

    reached: int = -2
    times: int = 0

    def count(self, reached: int) -> int:
        """One more, after that round; how many there were since."""
        self.times = self.times + 1 if reached == self.reached else 1
        self.reached = reached
        return self.times


class SteadyClock:
    """Notices when the wall clock jumps against the monotonic one.

    Rounds' deadlines run on the monotonic clock and don't care. Certificates, tokens and everything that
    people read go by the wall clock, so a jump shall be seen before more is written.
    """

    def __init__(
        self, wall: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._wall, self._monotonic = wall, monotonic
        self._lock = threading.Lock()
        self._offset = wall() - monotonic()

    def check(self) -> None:
        """Pause on a jump; from then on the new time is taken as right.

        Raises:
            Paused: the clock jumped since the last check.
        """
        with self._lock:
            offset = self._wall() - self._monotonic()
            jump, self._offset = offset - self._offset, offset
        if abs(jump) > TOLERANCE_S:
            raise Paused(f"the clock jumped by {jump:+.0f} s; check this machine's time, the run goes on")


class _Errand:
    """A piece of work for another thread."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._work = work
        self.done: Future[None] = Future()

    def run(self) -> None:
        """Do it, unless nobody waits for it any more; what goes wrong is its asker's."""
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            self._work()
        except Exception as error:
            self.done.set_exception(error)
        else:
            self.done.set_result(None)


class Control:
    """One run's switch. Its methods may be called on any thread."""

    def __init__(self, clock: SteadyClock) -> None:
        self._clock = clock
        self._asked = threading.Condition()
        self._halt: Halt | None = None
        self._errands: deque[_Errand] = deque()
        self._end_work: Callable[[], None] | None = None

    def halt(self, why: Halt) -> None:
        """Ask the run's thread to leave the run; a person's word outweighs the server's end.

        A person does not wait for a process that is at work for the run: it is killed.
        """
        with self._asked:
            if self._halt is None or isinstance(why, Stopped):
                self._halt = why
            self._asked.notify_all()
            if self._end_work is not None and isinstance(why, Stopped):
                self._end_work()

    def take_halt(self) -> None:
        """The run's thread has heard it; what comes from now on is asked anew."""
        with self._asked:
            self._halt = None

    @contextmanager
    def kill_on_stop(self, kill: Callable[[], None]) -> Iterator[None]:
        """While the run's thread waits in this block, a person's stop calls `kill`, which must end the wait.

        Raises:
            Stopped: a person has stopped the run, before the block or in it.
        """
        with self._asked:
            self._leave_if_stopped()
            self._end_work = kill
        try:
            yield
        except ProcessLostError:
            self._leave_if_stopped()
            raise
        finally:
            with self._asked:
                self._end_work = None

    def _leave_if_stopped(self) -> None:
        if isinstance(self._halt, Stopped):
            raise self._halt

    def errand(self, work: Callable[[], None]) -> Future[None]:
        """Have something done by the run's thread, to which the model belongs, while it waits for agents."""
        errand = _Errand(work)
        with self._asked:
            self._errands.append(errand)
            self._asked.notify_all()
        return errand.done

    def leave(self) -> None:
        """The run's thread is at its end: what is still asked of it stays undone."""
        while self._errands:
            self._errands.popleft().done.set_exception(UsageError("the run has just ended; ask again"))

    def check(self) -> None:
        """Leave if that was asked for; do what else was.

        Raises:
            Halt: what was asked.
        """
        if self._halt is not None:
            raise self._halt
        while self._errands:
            self._errands.popleft().run()

    def gate(self) -> None:
        """What must hold before a round is opened or closed.

        Raises:
            Paused: it doesn't, for now.
        """
        self._clock.check()

    def sleep(self, seconds: float) -> None:
        """Wait, and meanwhile do and leave as `check` does."""
        until = time.monotonic() + seconds
        self.check()
        while (left := until - time.monotonic()) > 0:
            with self._asked:
                self._asked.wait_for(lambda: self._halt is not None or bool(self._errands), left)
            self.check()


@dataclass(frozen=True)
class Patience:
    """How long a round waits for its last answers where the run file sets no deadline.

    Attributes:
        round_s: for members that are connected, or too many to go on without: one that never answers costs so
            much, and does not stop the run.
        away_s: how long members have to be away to be left out once all others have answered, and they are
            the run's quorum.
    """

    round_s: float = 21_600.0
    away_s: float = 600.0


PATIENCE = Patience()


@runtime_checkable
class Presence(Protocol):
    """A grid that knows which agents are connected."""

    def away_s(self, node: int) -> tuple[str, float] | None:
        """An agent's name and for how many seconds it has been away; None: it is here."""
        ...


class WatchedGrid(PolledGrid):
    """A grid whose user leaves when the run's switch says so.

    Args:
        away_s: how long an agent has to be away before a round does without it.
        waits_for: told for whom alone a round waits, by name, and for how many seconds each has been away, as
            soon as that changes; of nobody when it is over.
    """

    def __init__(
        self,
        inner: Grid,
        control: Control,
        *,
        away_s: float = math.inf,
        waits_for: Callable[[Mapping[str, float]], None] = lambda away: None,
    ) -> None:
        self._inner, self._control, self._away_s, self._waits_for = inner, control, away_s, waits_for
        self._awaited: frozenset[str] = frozenset()

    def get_node_ids(self) -> Iterable[int]:
        """As the inner grid; leaves."""
        self._control.check()
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the inner grid; leaves."""
        self._control.check()
        self._tell({})
        return self._inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the inner grid; leaves."""
        self._control.check()
        return self._inner.pull_messages(message_ids)

    def has_given_up(self, nodes: Collection[int]) -> bool:
        """See `Attendance`: nobody is given up who is here, or was a moment ago."""
        if not isinstance(self._inner, Presence):
            return False
        found = [self._inner.away_s(node) for node in nodes]
        away = dict(one for one in found if one is not None)
        only_those = bool(away) and len(away) == len(found)
        self._tell(away if only_those else {})
        return only_those and min(away.values()) >= self._away_s

    def is_gone(self, node: int) -> bool:
        """See `Attendance`."""
        away = self._inner.away_s(node) if isinstance(self._inner, Presence) else None
        return away is not None and away[1] >= self._away_s

    def _tell(self, away: Mapping[str, float]) -> None:
        if away.keys() != self._awaited:
            self._awaited = frozenset(away)
            self._waits_for(away)

    def cancel(self, message_ids: Iterable[str]) -> None:
        """As the inner grid, if it can."""
        self._tell({})
        if isinstance(self._inner, Cancels):
            self._inner.cancel(message_ids)

    def free_place(self, round_: int, client: str) -> None:
        """As the inner grid, if it has places."""
        if isinstance(self._inner, Spares):
            self._inner.free_place(round_, client)
