"""The global state on its way down in runs with a downlink stage; see `protos/fedpeft/v1/state.proto`."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from fedpeft.errors import UpdateError
from fedpeft.v1 import state_pb2 as pb
from fedpeft.wire.codec import PROTOCOL_VERSION
from fedpeft.wire.size_limits import DIGEST_BYTES, MAX_TENSORS

MAX_STEPS = MAX_TENSORS


@dataclass(frozen=True)
class StateMessage:
    """A whole state, or the steps to it from one that the receiver holds (none: it holds the state itself).

    Attributes:
        state_digest: fingerprint of the state that the receiver holds afterwards, hex.
        whole: bytes that `fedpeft.wire.codec.encode` made of plain arrays; empty where steps serve.
        steps: bytes that it made of changes, oldest first; each header names the state that it leads to.
        keep: later messages may build on this state.
    """

    state_digest: str
    whole: bytes = b""
    steps: tuple[bytes, ...] = ()
    keep: bool = False


def encode_state(message: StateMessage) -> bytes:
    """Serialise; equal messages give equal bytes."""
    made = pb.StateMessage(
        protocol_version=PROTOCOL_VERSION,
        state_digest=bytes.fromhex(message.state_digest),
        keep=message.keep,
        whole=message.whole,
        steps=message.steps,
    )
    return made.SerializeToString(deterministic=True)


def decode_state(payload: bytes, *, who: str) -> StateMessage:
    """Inverse of `encode_state`. The parts have checksums of their own; the fingerprint covers the result.

    Raises:
        UpdateError: not such a message, of another version, or with both a whole state and steps.
    """
    try:
        message = pb.StateMessage.FromString(payload)
    except DecodeError as error:
        raise UpdateError(
            f"{who}: {len(payload)} bytes came that are no state message (foreign or malformed)"
        ) from error
    if message.protocol_version != PROTOCOL_VERSION:
        raise UpdateError(
            f"{who}: protocol version {message.protocol_version} came, {PROTOCOL_VERSION} is spoken here;"
            " update one side"
        )
    if len(message.state_digest) != DIGEST_BYTES or len(message.steps) > MAX_STEPS:
        raise UpdateError(
            f"{who}: a state message with {len(message.state_digest)} bytes of digest and"
            f" {len(message.steps)} steps came, {DIGEST_BYTES} and at most {MAX_STEPS} are possible"
        )
    if message.whole and message.steps:
        raise UpdateError(f"{who}: a whole state and steps to it came in one message; one of them is needed")
    return StateMessage(message.state_digest.hex(), message.whole, tuple(message.steps), keep=message.keep)
