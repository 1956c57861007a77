"""A round's state as each client is sent it, where clients hold different parts or different bases."""

from __future__ import annotations

from fedpeft.errors import FederationError
from fedpeft.ledger.records import ClientOutcome
from fedpeft.rounds.downlink.state_payload import state_payload
from fedpeft.rounds.round_context import RoundContext
from fedpeft.updates.update import Arrays, arrays_digest


class PerClientStates:
    """Messages by what they hold: clients that hold the same share one.

    Args:
        state: the whole one, which round `number` begins with.
    """

    def __init__(self, federation: RoundContext, state: Arrays, number: int) -> None:
        self._federation, self._state, self._number = federation, state, number
        self._made: dict[tuple[object, str], tuple[bytes, str]] = {}

    def payload(self, client: str) -> bytes:
        """The message for one client; one object for all that get the same."""
        return self._view(client)[0]

    def size(self, client: str) -> int:
        """Its length."""
        return len(self.payload(client))

    def digest(self, client: str) -> str:
        """The fingerprint of what one client is sent."""
        return self._view(client)[1]

    def past(self, whole: bytes, digest: str) -> bytes:
        """Nothing: rounds with parts are synchronous.

        Raises:
            FederationError: always.
        """
        raise FederationError("an older state was asked for, and clients hold parts of states; begin anew")

    def record_outcome(self, outcome: ClientOutcome, round_: int | None = None) -> None:
        """Nothing depends on it."""

    def _view(self, client: str) -> tuple[bytes, str]:
        federation = self._federation
        base = federation.roster.base_of(client)
        share = federation.shares.of(client)
        key = ((share.rank, share.ratio), base)
        if key not in self._made:
            arrays = federation.shares.view(client, self._state)
            digest = arrays_digest(arrays)
            payload = state_payload(federation, arrays, self._number, digest, base=base)
            self._made[key] = (payload, digest)
        return self._made[key]
