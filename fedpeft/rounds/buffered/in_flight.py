"""Who is at work in buffered rounds, on which task, and who is asked next: no messages, only decisions.

Every decision follows from the run's seed, what is in the checkpoint and the order in which work comes in. On
a virtual clock that order is decided here too, so a simulation is the same every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.config.sections import BufferSection, RunConfig
from fedpeft.errors import FederationError
from fedpeft.ledger.records import ClientOutcome
from fedpeft.rounds.simulated_clock import VirtualClock
from fedpeft.runtime.randomness import stream
from fedpeft.training.steps import examples_per_round
from fedpeft.transport.roster import Roster


@dataclass(frozen=True)
class InFlightTask:
    """One client at work. Times are virtual seconds since the run began; 0 without a clock.

    Attributes:
        round: its task's: it works on the state of the round before.
        arrives_s: infinite if it has vanished.
        bytes_down: of what it was sent.
    """

    client: str
    round: int
    asked_s: float
    arrives_s: float
    bytes_down: int


class InFlightTasks:
    """All clients at work.

    A client is asked at most once in a round, and not again in one that its work came in. So a row holds each
    client at most once, and nobody trains twice on one state. Within that, those who are asked are drawn
    uniformly.

    Args:
        pending: from the checkpoint, see `memory`; empty before the first round.

    Raises:
        FederationError: fewer clients than a buffer or the concurrency needs.
    """

    def __init__(self, run: RunConfig, roster: Roster, pending: Mapping[str, NDArray[Any]]) -> None:
        self._section = buffer_of(run)
        problems = concurrency_problems(self._section, len(roster.members))
        if problems:
            raise FederationError(problems[0])
        self._run, self._roster, self._names = run, roster, roster.by_joining
        clock = run.federation.clock
        self._clock = None if clock is None else VirtualClock(clock, run.run.seed)
        deadline_s = run.federation.deadline_s
        self._patience_s = math.inf if deadline_s is None or clock is None else deadline_s
        self.now_s, self.working = _restore(self._names, pending)
        self._number = 0
        self._turns: list[str] = []
        self._landed: set[str] = set()  # in the round that is open

    def admit(self, roster: Roster) -> None:
        """Others have joined; they are asked from the round on that the roster names."""
        self._roster, self._names = roster, roster.by_joining

    def open(self, number: int) -> list[tuple[InFlightTask, ClientOutcome]]:
        """Begin a round; gives up those whose state is too old now, and returns them."""
        self._number = number
        rng = stream(self._run.run.seed, "buffer", number)
        names = [name for name in self._names if self._roster.members[name].since <= number]
        self._turns = [names[index] for index in reversed(rng.permutation(len(names)))]
        self._landed = set()
        bound = self._section.max_staleness
        return [self._too_old(flight) for flight in self._in_order() if number - flight.round > bound]

    def fill(self, bytes_down: Callable[[str], int], bytes_up: int) -> list[InFlightTask]:
        """Send out as many as there is room for; who was sent out.

        Args:
            bytes_down: what a client is sent, by name.
            bytes_up: what an update is expected to weigh.
        """
        sent = []
        while len(self.working) < self._section.concurrency and self._turns:
            name = self._turns.pop()
            if name not in self.working and name not in self._landed and self._present(name):
                sent.append(self.ask(name, self._number, bytes_down(name), bytes_up))
        return sent

    @property
    def waiting(self) -> list[str]:
        """Those who can still be asked in the round that is open."""
        return [name for name in self._turns if name not in self.working and name not in self._landed]

    def ask(self, name: str, round_: int, bytes_down: int, bytes_up: int) -> InFlightTask:
        """Send out this one, whoever's turn it is."""
        flight = InFlightTask(name, round_, self.now_s, self.now_s, bytes_down)
        if self._clock is not None:
            examples = examples_per_round(
                self._run.of_client(name).training, self._roster.members[name].examples
            )
            fate = self._clock.fate(name, round_, examples=examples, bytes_down=bytes_down, bytes_up=bytes_up)
            flight = InFlightTask(name, round_, self.now_s, self.now_s + fate.arrives_s, bytes_down)
        self.working[name] = flight
        return flight

    def answers(self, flight: InFlightTask) -> bool:
        """Whether its work will come in before it is given up, as far as the clock knows."""
        return not math.isinf(flight.arrives_s) and flight.arrives_s <= self._give_up_time_s(flight)

    def next_by_clock(self) -> InFlightTask | None:
        """The one that is due first, at which the clock then stands; None if nobody ever will be."""
        first = min(
            self.working.values(), key=lambda flight: (self._due_s(flight), flight.client), default=None
        )
        if first is None or math.isinf(self._due_s(first)):
            return None
        self.now_s = self._due_s(first)
        return first

    def land(self, flight: InFlightTask, outcome: ClientOutcome) -> ClientOutcome:
        """Its work is over; the outcome with what is known of the flight."""
        del self.working[flight.client]
        self._landed.add(flight.client)
        known: dict[str, Any] = {"staleness": self._number - flight.round, "bytes_down": flight.bytes_down}
        if self._clock is not None:
            known["virtual_s"] = self.now_s - flight.asked_s
        return outcome.model_copy(update=known)

    def overdue(self, flight: InFlightTask) -> ClientOutcome:
        """What became of one that does not answer in time."""
        if math.isinf(flight.arrives_s):
            return ClientOutcome(client=flight.client, status="dropped", reason="vanished after it was asked")
        limit = self._run.federation.deadline_s
        return ClientOutcome(
            client=flight.client,
            status="late",
            reason="no answer in time, or it left" if limit is None else f"no answer in {limit:g} s",
        )

    def memory(self) -> dict[str, NDArray[Any]]:
        """Clients by their place in the order of joining, their tasks, and the time: for a checkpoint."""
        flights = self._in_order()
        places = {name: place for place, name in enumerate(self._names)}
        return {
            "client": np.array([places[flight.client] for flight in flights], dtype=np.int64),
            "round": np.array([flight.round for flight in flights], dtype=np.int64),
            "asked_s": np.array([flight.asked_s for flight in flights], dtype=np.float64),
            "arrives_s": np.array([flight.arrives_s for flight in flights], dtype=np.float64),
            "bytes_down": np.array([flight.bytes_down for flight in flights], dtype=np.int64),
            "now_s": np.array([self.now_s], dtype=np.float64),
        }

    def _too_old(self, flight: InFlightTask) -> tuple[InFlightTask, ClientOutcome]:
        age, bound = self._number - flight.round, self._section.max_staleness
        reason = f"given up: {age} rounds ended while it worked, max_staleness is {bound}"
        return flight, self.land(flight, ClientOutcome(client=flight.client, status="late", reason=reason))

    def _present(self, name: str) -> bool:
        return self._clock is None or self._clock.available(name, self._number)

    def _give_up_time_s(self, flight: InFlightTask) -> float:
        return flight.asked_s + self._patience_s

    def _due_s(self, flight: InFlightTask) -> float:
        return min(flight.arrives_s, self._give_up_time_s(flight))

    def _in_order(self) -> list[InFlightTask]:
        return [self.working[name] for name in sorted(self.working)]


def buffer_of(run: RunConfig) -> BufferSection:
    """The section of a run in mode 'buffered'.

    Raises:
        FederationError: the run is synchronous.
    """
    if run.federation.buffer is None:
        raise FederationError("the run has no [federation.buffer]; its rounds are synchronous")
    return run.federation.buffer


def overlap_of(run: RunConfig) -> int:
    """How many rounds may end while a client works for its update still to count; 0 where none may."""
    return 0 if run.federation.buffer is None else run.federation.buffer.max_staleness


def concurrency_problems(section: BufferSection, clients: int) -> list[str]:
    """What is wrong with the buffer, given how many clients there are."""
    return [
        f"federation.buffer.{key}: {count} {what} and there are {clients} clients; lower it, or bring"
        f" {count - clients} more clients"
        for key, count, what in (
            ("size", section.size, "updates make a round, at most one of each client,"),
            ("concurrency", section.concurrency, "clients shall work at a time"),
        )
        if count > clients
    ]


def _restore(names: list[str], pending: Mapping[str, NDArray[Any]]) -> tuple[float, dict[str, InFlightTask]]:
    """The time and the flights of a checkpoint."""
    if not pending:
        return 0.0, {}
    columns = (pending[key].tolist() for key in ("client", "round", "asked_s", "arrives_s", "bytes_down"))
    flights = [InFlightTask(names[place], *rest) for place, *rest in zip(*columns, strict=True)]
    return float(pending["now_s"][0]), {flight.client: flight for flight in flights}
