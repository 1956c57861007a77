"""Buffered asynchronous rounds: clients work all the time, and a round is a buffer that fills.

Source: Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek and Huba 2022, FedBuff, algorithm 1. A client that is
done is replaced at once by another one, which starts from the newest state; an update is weighted down by how
many rounds ended while it was made; `size` of them make a round. We differ in asking a client once per round
at most (`InFlightTasks`), and in giving up work that is more than `max_staleness` rounds old.

On a virtual clock updates are folded in the order in which it has them arrive, whenever they were computed.
Without one they are folded as they come. After a restart those that were durable before it come first, in the
order in which they were accepted. The row of a round names all its updates in the order of folding.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Iterable, Sequence

from flwr.app import Message

from fedpeft.aggregation.staleness import weight_units
from fedpeft.errors import StateError
from fedpeft.ledger import Checkpoint, Cohort
from fedpeft.ledger.records import ClientOutcome
from fedpeft.rounds.buffered.buffered_sum import BufferedSum
from fedpeft.rounds.buffered.in_flight import InFlightTask, InFlightTasks, buffer_of
from fedpeft.rounds.collector import CollectedRound, Opening, refuse_too_few
from fedpeft.rounds.downlink.state_payload import state_payload
from fedpeft.rounds.private_rounds import RoundPrivacy
from fedpeft.rounds.replies import RoundReplies, TaskRequest, note, process_reply, task_contents
from fedpeft.rounds.round_context import RoundContext
from fedpeft.rounds.strategies import StrategyRunner
from fedpeft.transport.mailbox import Mailbox
from fedpeft.transport.message_exchange import Attendance
from fedpeft.transport.tasks import TRAIN
from fedpeft.updates.update import arrays_digest, layout_of


class BufferedRounds:
    """See the module; a `UpdateCollector`.

    Args:
        checkpoint: the last committed round.
    """

    def __init__(
        self,
        federation: RoundContext,
        strategy: StrategyRunner,
        privacy: RoundPrivacy,
        checkpoint: Checkpoint,
    ) -> None:
        self._federation, self._strategy, self._privacy = federation, strategy, privacy
        self._section = buffer_of(federation.run)
        self._flights = InFlightTasks(federation.run, federation.roster, checkpoint.pending)
        self._mail = Mailbox(federation.grid, federation.timeout_s)
        self._by_clock = federation.run.federation.clock is not None
        self._digests: dict[int, str] = {}  # of the states that somebody works on, by their tasks' round
        arrived = (
            () if self._by_clock or federation.history is None else federation.history.list_uncommitted()
        )
        self._arrived = deque(arrived)  # before a restart: (client, round)
        self._adrift = dict(self._flights.working)  # at work since before a restart, not yet asked again
        self._spent = False  # whether some client's privacy budget is

    def collect(self, opening: Opening) -> CollectedRound | None:
        """Fill one buffer; None as soon as a client's privacy budget does not allow it to be asked."""
        flights, number = self._flights, opening.number
        began_s, collected = flights.now_s, RoundReplies(opening.before.state)
        self._digests[number] = opening.digest
        given_up = flights.open(number)
        asked = flights.fill(opening.sending.size, opening.expected_bytes)
        self._federation.journal.open_round(number, self._cohort)  # durable, before anyone is asked
        self._federation.observer.round_started(number, self._section.size)
        for flight, outcome in given_up:
            self._mail.withdraw([flight.client])
            self._adrift.pop(flight.client, None)
            note(self._federation, self._privacy, collected, outcome)
        self._resend(opening)
        self._send(opening, asked)
        total = self._buffer(opening)
        while not self._spent and self._take_next(opening, total, collected):
            if total.count == self._section.size:  # who is asked next starts from the next state
                break
            self._send(opening, flights.fill(opening.sending.size, opening.expected_bytes))
        if self._spent:
            return None
        self._check_quorum(collected, number)
        self._forget_digests()
        return CollectedRound(
            change=total.close(number) if total.count else {},
            layout=total.layout,
            collected=collected,
            outcomes=tuple(collected.outcomes),
            virtual_s=flights.now_s - began_s if self._by_clock else None,
            notes=self._notes(total.count),
            staleness=_counts(collected.outcomes),
            pending=flights.memory(),
        )

    def admit(self, federation: RoundContext) -> None:
        """Others have joined."""
        self._federation = federation
        self._flights.admit(federation.roster)

    def close(self) -> None:
        """Tell those who are still at work that nobody waits for them."""
        self._mail.close()

    def _cohort(self) -> Cohort:
        """Everybody at work as the round begins."""
        working = sorted(self._flights.working)
        return Cohort(tuple(working), dict.fromkeys(working, 0.0))

    def _buffer(self, opening: Opening) -> BufferedSum:
        federation = self._federation
        return BufferedSum(
            self._strategy,
            federation.space,
            federation.space.update_layout(layout_of(opening.before.state)),
            weight_units(self._section.staleness_weight),
            capacity=self._section.size,
            quantum_exponent=federation.run.federation.quantum_exponent,
        )

    def _take_next(self, opening: Opening, total: BufferedSum, collected: RoundReplies) -> bool:
        """Wait for the next outcome and count it; False: nobody will ever answer."""
        landed = self._next_by_clock() if self._by_clock else self._next_to_come(opening, collected)
        if landed is None:
            return False
        flight, reply = landed
        if reply is None:
            self._mail.withdraw([flight.client])
            outcome = self._flights.overdue(flight)
        else:
            digest = self._digests[flight.round]
            asked = TaskRequest(flight.client, flight.round, digest, flight.bytes_down)
            aged = total.sum_of_age(opening.number - flight.round)
            outcome = process_reply(self._federation, aged, reply, asked, collected)
            opening.sending.record_outcome(outcome, flight.round)
        outcome = self._flights.land(flight, outcome)
        note(self._federation, self._privacy, collected, outcome)
        return True

    def _next_by_clock(self) -> tuple[InFlightTask, Message | None] | None:
        """Who is due next, and the answer if it will be in time."""
        flight = self._flights.next_by_clock()
        if flight is None:
            return None
        return flight, self._mail.of(flight.client) if self._flights.answers(flight) else None

    def _next_to_come(
        self, opening: Opening, collected: RoundReplies
    ) -> tuple[InFlightTask, Message | None] | None:
        """Whoever answers first, or has left; before that, whoever had answered before a restart."""
        while self._arrived:
            client, round_ = self._arrived.popleft()
            flight = self._flights.working.get(client)
            known = client in self._federation.roster.members
            # Turns come as before the restart, unless somebody who failed then is still at work now.
            if flight is None and known and round_ == opening.number:
                flight = self._flights.ask(client, round_, opening.sending.size(client), 0)
                self._send(opening, [flight])
            if self._spent:
                return None
            if flight is not None and flight.round == round_:
                return flight, self._mail.of(client)
        came = self._mail.first(lambda awaited: self._find_gone(awaited, collected))
        return None if came is None else (self._flights.working[came[0]], came[1])

    def _find_gone(self, awaited: Collection[str], collected: RoundReplies) -> str | None:
        """Return one that has left, and whose place another one can have or the round can do without.

        Where nobody else is here and the others are no quorum, all are waited for: who is asked in vain pays.
        """
        grid, members = self._federation.grid, self._federation.roster.members
        if not isinstance(grid, Attendance):
            return None
        gone = [client for client in sorted(awaited) if grid.is_gone(members[client].node_id)]
        if not gone:
            return None
        others = {*self._flights.working, *self._flights.waiting}
        some_here = any(not grid.is_gone(members[name].node_id) for name in others)
        return gone[0] if some_here or collected.folded >= self._quorum else None

    def _send(self, opening: Opening, flights: Sequence[InFlightTask]) -> None:
        """Ask for this round's work, unless a privacy budget stands against it."""
        if not self._charge(opening.number, flights):
            return
        payloads = {
            flight.client: opening.sending.payload(flight.client) for flight in self._select_awaited(flights)
        }
        self._mail.send(self._messages(opening.number, payloads))

    def _resend(self, opening: Opening) -> None:
        """After a restart: ask again for the work that was under way, on the states that it began with."""
        rounds: dict[int, list[InFlightTask]] = {}
        for flight in self._select_awaited(self._adrift.values()):
            rounds.setdefault(flight.round, []).append(flight)
        self._adrift = {}
        for number, flights in sorted(rounds.items()):
            if not self._charge(number, flights):  # once more, where they draw their noise anew
                return
            state = self._before(number).state
            self._digests[number] = arrays_digest(state)
            whole = state_payload(self._federation, state, number, self._digests[number])
            payload = opening.sending.past(whole, self._digests[number])
            clients = [flight.client for flight in flights]
            self._mail.send(self._messages(number, dict.fromkeys(clients, payload)))

    def _charge(self, number: int, flights: Sequence[InFlightTask]) -> bool:
        """Charge those who are asked, durably; False, from then on, where a budget does not allow it."""
        if flights and not self._privacy.spend(number, [flight.client for flight in flights]):
            self._spent = True
        return not self._spent

    def _select_awaited(self, flights: Iterable[InFlightTask]) -> list[InFlightTask]:
        """Those whose work will be wanted: on a virtual clock it is known who vanishes or comes too late."""
        return [flight for flight in flights if self._flights.answers(flight)]

    def _messages(self, number: int, payloads: dict[str, bytes]) -> dict[str, Message]:
        members = self._federation.roster.members
        return {
            name: Message(content, members[name].node_id, TRAIN, group_id=str(number))
            for name, content in task_contents(self._federation, number, payloads).items()
        }

    def _before(self, number: int) -> Checkpoint:
        """The state that the tasks of a past round start from.

        Raises:
            StateError: it is not kept.
        """
        if self._federation.history is None:
            raise StateError("clients were at work when the run was left, and nothing holds their states")
        return self._federation.history.checkpoint(number - 1)

    def _forget_digests(self) -> None:
        wanted = {flight.round for flight in self._flights.working.values()}
        self._digests = {number: digest for number, digest in self._digests.items() if number in wanted}

    @property
    def _quorum(self) -> int:
        """Updates without which a round is none."""
        return math.ceil(self._federation.run.federation.quorum * self._section.size)

    def _check_quorum(self, collected: RoundReplies, number: int) -> None:
        """A buffer that nobody is left to fill may do with fewer updates."""
        size, needed = self._section.size, self._quorum
        if collected.folded >= needed:
            return
        refuse_too_few(
            f"round {number}: {collected.folded} of {size} updates came, the quorum is {needed}, and nobody"
            " is left to ask",
            "lower federation.buffer.size or quorum, or set federation.deadline_s",
            collected,
            collected.outcomes,
        )

    def _notes(self, count: int) -> tuple[str, ...]:
        size = self._section.size
        return () if count == size else (f"the round ended with {count} of {size} updates: nobody was left",)


def _counts(outcomes: Iterable[ClientOutcome]) -> tuple[int, ...]:
    """Entry s: folded updates of staleness s."""
    counts = Counter(item.staleness or 0 for item in outcomes if item.status == "folded")
    return tuple(counts[age] for age in range(max(counts) + 1)) if counts else ()
