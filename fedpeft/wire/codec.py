"""`Envelope` to protobuf bytes and back: the one form in which arrays leave a process.

A length is never trusted: the message's size is checked against the run's own layout before it is parsed,
shapes and dtypes against that layout, and byte counts against shapes, before an array is made. Arrays that
come out are read-only views of the received bytes; compressed tensors come out in their compressed forms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import cast, get_args

from google.protobuf.message import DecodeError

from fedpeft.errors import UpdateError
from fedpeft.updates.update import Arrays, EncodedArray, Layout, freeze_arrays, layout_of
from fedpeft.v1 import update_pb2 as pb
from fedpeft.wire.checksum import SIZE, check_seal, seal
from fedpeft.wire.dense import Pieces, dense_field, find_dense, read_dense
from fedpeft.wire.exact import Exact, codable, exact_payload, read_exact, write_exact
from fedpeft.wire.fields import Field, MalformedError
from fedpeft.wire.payloads import Payload, payload_of, read_coded, write_coded
from fedpeft.wire.size_limits import DIGEST_BYTES, check_header, check_size

PROTOCOL_VERSION = 1


@dataclass(frozen=True)
class Envelope:
    """Arrays, plain or compressed, with what a receiver needs to know before it uses them.

    Attributes:
        arrays: name to plain array.
        run_digest: SHA-256 of the resolved run file, hex, as all digests here; empty where it means nothing.
        round: from 1.
        state_digest: fingerprint of the global state that the arrays are, or that the client started from.
        space: how the arrays express a change.
        client: the sender; empty on the way down.
        weight: 0 where privacy forbids to tell it; it is then absent from the message.
        metrics: numbers that accompany an update.
        encoded: name to compressed array; either this or `arrays` is empty.
        base_digest: fingerprint of everything frozen in the sender's model.
        stages: (kind, public parameters as JSON) of each stage that the update has passed through.
    """

    arrays: Arrays
    run_digest: str
    round: int
    state_digest: str
    space: str
    client: str = ""
    weight: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    encoded: Mapping[str, EncodedArray] = field(default_factory=dict)
    base_digest: str = ""
    stages: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "arrays", freeze_arrays(self.arrays))
        object.__setattr__(self, "encoded", MappingProxyType(dict(self.encoded)))
        object.__setattr__(self, "stages", tuple(self.stages))


def encode(envelope: Envelope) -> bytes:
    """Serialise; equal envelopes give equal bytes.

    Raises:
        UpdateError: an array whose dtype or form has no place in the schema, plain arrays beside compressed
            ones, or a header field beyond its bound.
    """
    message = pb.Update()
    payload = payload_of(envelope.encoded)
    if envelope.encoded and envelope.arrays:
        name = next(iter(envelope.arrays))
        raise UpdateError(f"array {name!r} is plain beside compressed ones; a message holds one kind")
    _write_header(message.header, envelope)
    check_header(message.header, "the message")
    exact = exact_payload(layout_of(envelope.arrays))
    large: Pieces = []
    if exact is not None and codable(envelope.arrays):
        write_exact(message, envelope.arrays, exact)
    elif payload == "dense":
        large = dense_field(envelope.arrays, message.ByteSize())
    else:
        write_coded(getattr(message, payload), envelope.encoded)
    return seal([message.SerializeToString(deterministic=True), *large])


def decode(payload: bytes, *, who: str, layout: Layout | None = None, expect: Payload = "dense") -> Envelope:
    """Parse and check bytes that came from outside.

    Args:
        payload: what `encode` made, or what an attacker made of it.
        who: named in errors.
        layout: what the arrays must be; without it only the message's own consistency is checked (a client
            that receives the first state has no layout to compare with).
        expect: the payload that the run's stages promise; compressed ones need `layout`. Vectors of integers,
            which no stage may change, have payloads of their own.

    Raises:
        UpdateError: not a message of this version, or one that contradicts itself, `layout` or `expect`.
        MissingExtraError: a compressed tensor names a coder whose package is not installed.
    """
    if layout is None and expect != "dense":
        raise UpdateError(f"{who}: a {expect} payload can only be read by the layout of its run")
    if layout is not None:
        check_size(payload, layout, who)
    check_seal(payload, who)
    message, dense = _parse(payload, who)
    came = "dense" if dense is not None else message.WhichOneof("payload")
    if layout is None and came in get_args(Exact):
        return _envelope(message.header, read_exact(message, cast(Exact, came), who, None), {})
    exact = exact_payload(layout) if layout is not None and expect == "dense" else None
    if came is None or came not in (exact, expect):
        raise UpdateError(
            f"{who}: a payload of {came or 'no known kind'} came, this run's stages send {exact or expect}"
        )
    if exact is not None and came == exact:
        return _envelope(message.header, read_exact(message, exact, who, layout), {})
    if dense is not None:
        return _envelope(message.header, read_dense(payload, dense, who, layout), {})
    if layout is None:  # never: what is neither dense nor exact was refused above
        raise UpdateError(f"{who}: a {came} payload can only be read by the layout of its run")
    return _envelope(message.header, {}, read_coded(getattr(message, expect), expect, who, layout))


def _parse(payload: bytes, who: str) -> tuple[pb.Update, Field | None]:
    """The message without its dense payload, and where that lies."""
    try:
        dense = find_dense(payload, len(payload) - SIZE)
        rest = payload if dense is None else payload[: dense.key] + payload[dense.end :]
        message = pb.Update.FromString(rest)
    except (DecodeError, MalformedError) as error:
        raise UpdateError(
            f"{who}: {len(payload)} bytes came that are no update message (foreign or malformed)"
        ) from error
    if dense is not None and message.WhichOneof("payload") is not None:
        raise UpdateError(f"{who}: two payloads came in one message")
    version = message.header.protocol_version
    if version != PROTOCOL_VERSION:
        raise UpdateError(
            f"{who}: protocol version {version} came, {PROTOCOL_VERSION} is spoken here; update one side"
        )
    check_header(message.header, who)
    return message, dense


def _write_header(header: pb.Header, envelope: Envelope) -> None:
    header.protocol_version = PROTOCOL_VERSION
    header.run_digest = _digest_bytes("run_digest", envelope.run_digest)
    header.round = envelope.round
    header.client = envelope.client
    header.state_digest = _digest_bytes("state_digest", envelope.state_digest)
    header.space = envelope.space
    if envelope.weight:
        header.weight = envelope.weight
    header.metrics.update(envelope.metrics)
    header.base_digest = _digest_bytes("base_digest", envelope.base_digest)
    for kind, parameters in envelope.stages:
        header.stages.add(kind=kind, parameters=parameters)


def _envelope(header: pb.Header, arrays: Arrays, encoded: Mapping[str, EncodedArray]) -> Envelope:
    return Envelope(
        arrays=arrays,
        run_digest=header.run_digest.hex(),
        round=header.round,
        state_digest=header.state_digest.hex(),
        space=header.space,
        client=header.client,
        weight=header.weight,
        metrics=dict(header.metrics),
        encoded=encoded,
        base_digest=header.base_digest.hex(),
        stages=tuple((stage.kind, stage.parameters) for stage in header.stages),
    )


def _digest_bytes(what: str, text: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b"?"
    if len(digest) not in (0, DIGEST_BYTES):
        raise UpdateError(f"{what} {text[:20]!r} came, {2 * DIGEST_BYTES} hex digits are needed")
    return digest
