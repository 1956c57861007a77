"""What may keep a run from going on: people who stop it, the server that ends, a clock that jumps."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedpeft.errors import UsageError
from fedpeft.flower.exchange import Cancels, Spares
from fedpeft.flower.polled_grid import PolledGrid

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
    def killed_with(self, kill: Callable[[], None]) -> Iterator[None]:
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


class WatchedGrid(PolledGrid):
    """A grid whose user leaves when the run's switch says so."""

    def __init__(self, inner: Grid, control: Control) -> None:
        self._inner, self._control = inner, control

    def get_node_ids(self) -> Iterable[int]:
        """As the inner grid; leaves."""
        self._control.check()
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As the inner grid; leaves."""
        self._control.check()
        return self._inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As the inner grid; leaves."""
        self._control.check()
        return self._inner.pull_messages(message_ids)

    def cancel(self, message_ids: Iterable[str]) -> None:
        """As the inner grid, if it can."""
        if isinstance(self._inner, Cancels):
            self._inner.cancel(message_ids)

    def free_place(self, round_: int, client: str) -> None:
        """As the inner grid, if it has places."""
        if isinstance(self._inner, Spares):
            self._inner.free_place(round_, client)
