"""What a round asks of whoever gathers its updates: at once, or as a buffer that fills."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from fedpeft.errors import FederationError, QuorumError
from fedpeft.ledger import Checkpoint
from fedpeft.ledger.records import Aggregation, ClientOutcome
from fedpeft.rounds.downlink.broadcast import Outgoing
from fedpeft.rounds.downlink.per_client_state import PerClientStates
from fedpeft.rounds.replies import RoundReplies
from fedpeft.rounds.round_context import RoundContext
from fedpeft.updates.update import Arrays, Layout


@dataclass(frozen=True)
class Opening:
    """A round that begins.

    Attributes:
        before: the last committed round.
        payload: its state as bytes.
        digest: the state's fingerprint.
        sending: the state on its way to clients.
    """

    number: int
    before: Checkpoint
    payload: bytes
    digest: str
    sending: Outgoing

    def digest_of(self, client: str) -> str:
        """The fingerprint of what one client is sent."""
        return self.sending.digest(client) if isinstance(self.sending, PerClientStates) else self.digest

    @property
    def expected_bytes(self) -> int:
        """What an update will weigh: the mean of the round before; at first, as much as the state."""
        sizes = [outcome.bytes_up for outcome in self.before.row.outcomes if outcome.bytes_up]
        return round(sum(sizes) / len(sizes)) if sizes else len(self.payload)


@dataclass(frozen=True)
class CollectedRound:
    """What a round has gathered.

    Attributes:
        change: the aggregate; empty: the state stays as it is.
        layout: of an update.
        outcomes: everybody's, in the order in which the row shall have them.
        virtual_s: the round's length on the virtual clock; None without one.
        staleness: see `Round.staleness`.
        pending: see `Checkpoint.pending`.
        aggregation: see `Round.aggregation`.
    """

    change: Arrays
    layout: Layout
    collected: RoundReplies
    outcomes: tuple[ClientOutcome, ...]
    virtual_s: float | None
    notes: tuple[str, ...] = ()
    staleness: tuple[int, ...] = ()
    pending: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    aggregation: Aggregation | None = None


class UpdateCollector(Protocol):
    """How a run's rounds come by their updates."""

    def collect(self, opening: Opening) -> CollectedRound | None:
        """Ask, wait and aggregate; None, with nobody asked, if the run must end before this round.

        Raises:
            QuorumError: too few updates.
            FedPEFTError: what clients failed with, if they are too few because of it.
        """
        ...

    def admit(self, federation: RoundContext) -> None:
        """Others have joined: the federation with them, before a round."""
        ...

    def close(self) -> None:
        """The run is over: let those go who are still at work."""
        ...


def refuse_too_few(summary: str, advice: str, collected: RoundReplies, outcomes: list[ClientOutcome]) -> None:
    """Stop the run over too few updates, with the first client's own error if there is one.

    Args:
        summary: how many there are, and how many are needed.
        advice: what to do where nobody failed.
    """
    if collected.errors:
        first = min(
            (o for o in outcomes if o.status in ("failed", "refused")), key=lambda outcome: outcome.client
        )
        kind = type(collected.errors[0])
        if kind is FederationError:  # what went wrong is around the clients, and may be over the next time
            kind = QuorumError
        raise kind(f"{summary}; {first.client}: {first.reason}")
    raise QuorumError(f"{summary}; {advice}")
