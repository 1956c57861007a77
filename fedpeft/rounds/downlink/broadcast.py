"""Who holds which state, and what it takes to bring each client to the current one.

States are numbered by round. A client that answered a task of round r holds state r - 1, which its answer
names by fingerprint. It is sent the steps since then, or the whole state where that is smaller; so no more
steps are kept than a whole state weighs. A client that is believed to hold an older state than it does is
served all the same (`fedpeft.rounds.downlink.replica`); one that failed is believed to hold nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.ledger.records import ClientOutcome
from fedpeft.rounds.downlink.state_steps import Step, Steps
from fedpeft.updates.update import Arrays
from fedpeft.wire.state_message import StateMessage, encode_state

NOTHING = -1  # held by a client that has no state, or none that is known
_HELD, _STEP, _MEMORY = "held", "step/", "memory/"


class Outgoing(Protocol):
    """A round's state on its way to clients."""

    def payload(self, client: str) -> bytes:
        """The message for one client; one object for all that get the same."""
        ...

    def size(self, client: str) -> int:
        """Bytes that a client of its own would be sent."""
        ...

    def past(self, whole: bytes, digest: str) -> bytes:
        """The message that brings an older state, for one who was asked to work on it before a restart.

        Args:
            whole: that state as bytes.
            digest: its fingerprint.
        """
        ...

    def record_outcome(self, outcome: ClientOutcome, round_: int | None = None) -> None:
        """What became of an asked client.

        Args:
            round_: of its task; None: the round that is open.
        """
        ...


@dataclass(frozen=True)
class WholeStates:
    """Everyone is sent the whole state, in every round."""

    whole: bytes

    def payload(self, client: str) -> bytes:
        """The state."""
        return self.whole

    def size(self, client: str) -> int:
        """Its length."""
        return len(self.whole)

    def past(self, whole: bytes, digest: str) -> bytes:
        """The state."""
        return whole

    def record_outcome(self, outcome: ClientOutcome, round_: int | None = None) -> None:
        """Nothing depends on it."""


class Broadcast:
    """Everyone is sent the steps that it lacks, or the whole state where that is smaller.

    Args:
        steps: how states follow each other.
        clients: names of all clients of the run.
        shared: clients work in this process or forks of it and are handed the whole state, whatever it would
            cost to send; what it would cost is still counted.
        secret: nobody but the server is to know whom a round asked.
    """

    def __init__(self, steps: Steps, clients: Sequence[str], *, shared: bool, secret: bool = False) -> None:
        self._steps = steps
        self._shared, self._secret = shared, secret
        self._held = dict.fromkeys(sorted(clients), NOTHING)
        self._log: dict[int, bytes] = {}  # round to the step that it made, without gaps up to the last round
        self._memory: Mapping[str, NDArray[Any]] = {}
        self._round, self._digest, self._whole = 0, "", b""
        self._messages: dict[int, bytes] = {}

    def admit(self, clients: Sequence[str]) -> None:
        """Others have joined; those who are new hold nothing."""
        self._held = {name: self._held.get(name, NOTHING) for name in sorted(clients)}

    def open(self, number: int, whole: bytes, digest: str) -> None:
        """Begin a round: what clients are to hold is the state before it, as bytes and as fingerprint."""
        self._round, self._digest, self._whole = number, digest, whole
        self._messages = {}
        self._prune()

    def payload(self, client: str) -> bytes:
        """The message for one client; one object for all that get the same."""
        if self._shared:
            return self._once(NOTHING - 1, StateMessage(self._digest, self._whole))
        return self._message(client)

    def size(self, client: str) -> int:
        """Bytes that a client of its own would be sent."""
        return len(self._message(client))

    def past(self, whole: bytes, digest: str) -> bytes:
        """Whole: nothing is known of who holds what."""
        return encode_state(StateMessage(digest, whole, keep=not self._shared))

    def record_outcome(self, outcome: ClientOutcome, round_: int | None = None) -> None:
        """A counted answer names its task's state: its sender holds it. A failed one may hold nothing."""
        if outcome.status == "folded":
            self._held[outcome.client] = (self._round if round_ is None else round_) - 1
        elif outcome.status == "failed":
            self._held[outcome.client] = NOTHING

    def advance(self, state: Arrays, change: Mapping[str, NDArray[Any]]) -> Step:
        """This round's step from `state`, kept for those who will need it; an empty change is none."""
        step = Step(state, memory=self._memory)
        if change:
            step = self._steps.make(self._round, state, change, self._memory)
        self._memory = step.memory
        self._log[self._round] = step.payload
        return step

    def memory(self) -> dict[str, NDArray[Any]]:
        """Everything that the next round depends on, for a checkpoint.

        Who holds what is left out where it would tell whom a secret cohort asked, and is no use: `restore`
        takes it only where clients share this process.
        """
        kept: dict[str, NDArray[Any]] = {}
        if self._shared or not self._secret:
            kept[_HELD] = np.array(list(self._held.values()), dtype=np.int64)
        kept |= {f"{_STEP}{number}": np.frombuffer(step, np.uint8) for number, step in self._log.items()}
        return kept | {_MEMORY + name: array for name, array in self._memory.items()}

    def restore(self, memory: Mapping[str, NDArray[Any]]) -> None:
        """Inverse of `memory`. Clients of other processes may have lost their states: they get whole ones."""
        if self._shared and _HELD in memory:
            self._held = dict(zip(self._held, memory[_HELD].tolist(), strict=True))
        numbers = sorted(int(name.removeprefix(_STEP)) for name in memory if name.startswith(_STEP))
        self._log = {number: memory[f"{_STEP}{number}"].tobytes() for number in numbers}
        self._memory = {
            name.removeprefix(_MEMORY): array for name, array in memory.items() if name.startswith(_MEMORY)
        }

    def _message(self, client: str) -> bytes:
        held = self._held[client]
        return self._messages.get(held) or self._once(held, self._smaller(held))

    def _smaller(self, held: int) -> StateMessage:
        needed = range(held + 1, self._round)
        if held == NOTHING or any(number not in self._log for number in needed):
            return StateMessage(self._digest, self._whole, keep=True)
        steps = tuple(self._log[number] for number in needed if self._log[number])  # see `_prune`
        return StateMessage(self._digest, steps=steps, keep=True)

    def _once(self, held: int, message: StateMessage) -> bytes:
        if held not in self._messages:
            self._messages[held] = encode_state(message)
        return self._messages[held]

    def _prune(self) -> None:
        """Forget the steps before the first from which a whole state is cheaper."""
        weight = 0
        for number in sorted(self._log, reverse=True):
            weight += len(self._log[number])
            if weight >= len(self._whole):
                del self._log[number]
