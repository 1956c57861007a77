"""A round's state as the bytes that clients are sent."""

from __future__ import annotations

from fedpeft.rounds.round_context import RoundContext
from fedpeft.updates.update import Arrays
from fedpeft.wire.codec import Envelope, encode


def state_payload(
    federation: RoundContext, state: Arrays, number: int, digest: str, *, base: str | None = None
) -> bytes:
    """The state that the tasks of round `number` start from.

    Args:
        digest: its fingerprint.
        base: that of the base model that its receivers hold; None: the one that clients have in common.
    """
    return encode(
        Envelope(
            arrays=state,
            run_digest=federation.task_digest,
            round=number,
            state_digest=digest,
            space=federation.space.kind,
            base_digest=federation.roster.base_digest if base is None else base,
        )
    )
