"""A client's copy of the global state, brought up to date by whole states or by steps."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.errors import FederationError
from fedpeft.rounds.downlink.state_steps import Steps
from fedpeft.updates.update import Arrays, arrays_digest
from fedpeft.wire.codec import decode
from fedpeft.wire.state_message import StateMessage

WHO = "the server's state"


@dataclass(frozen=True)
class Replica:
    """A state and its fingerprint."""

    digest: str
    arrays: Arrays


def catch_up(message: StateMessage, held: Replica | None, steps: Steps) -> Replica:
    """The state that `message` leads to.

    A client may hold a newer state than the server knows of, since its answer was lost: steps up to that
    state are passed over.

    Raises:
        FederationError: steps came for a state that is not held, or the result has another fingerprint than
            announced; nothing may be trained then.
        UpdateError: a part of the message is damaged or foreign.
    """
    if message.whole:
        return _check(decode(message.whole, who=WHO).arrays, message.state_digest)
    if held is None:
        raise FederationError(
            f"{len(message.steps)} steps came and no state is held here to take them from; the server sends"
            " the whole state next time"
        )
    if held.digest == message.state_digest:
        return held
    arrays = held.arrays
    for payload in message.steps:
        arrays, announced = steps.take(arrays, payload, who=WHO)
        if announced == held.digest:  # these steps are behind this client
            arrays = held.arrays
    return _check(arrays, message.state_digest)


def _check(arrays: Arrays, announced: str) -> Replica:
    digest = arrays_digest(arrays)
    if digest != announced:
        raise FederationError(
            f"the state that came has fingerprint {digest[:12]}, announced was {announced[:12]}; nothing was"
            " trained"
        )
    return Replica(digest, arrays)
