"""Reaching the server: channels, pauses between attempts, and what an error means."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime

import grpc

from fedpeft.credentials import Material
from fedpeft.errors import CredentialError, FederationError, FedPEFTError, ProtocolError, ValidityError
from fedpeft.wire.failures import from_text

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 60.0
STEADY_S = 30.0  # a session that lasted so long starts the pauses anew
MAX_MESSAGE_BYTES = 8 << 20  # the server says how much it sends at most; this is what any server may

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A NAT forgets quiet connections after minutes, a server that lost power says nothing: ask every 20 s,
    # which the server permits, also while there is no call.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Windows as small as the server's: many agents may share a machine.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 65536),
    ("grpc.enable_retries", 0),  # what is repeated, and when, is decided here
    ("grpc.use_local_subchannel_pool", 1),  # agents in one process have connections of their own
    ("grpc.enable_http_proxy", 1),
)


def open_channel(server: str, material: Material | None) -> grpc.aio.Channel:
    """A new channel; without material in plaintext."""
    if material is None:
        return grpc.aio.insecure_channel(server, options=_OPTIONS)
    return grpc.aio.secure_channel(server, channel_credentials(material), options=_OPTIONS)


def channel_credentials(material: Material) -> grpc.ChannelCredentials:
    """Both ends show certificates of the one authority."""
    return grpc.ssl_channel_credentials(
        root_certificates=material.authority_pem,
        private_key=material.key_pem,
        certificate_chain=material.certificate_pem,
    )


def pauses(rng: random.Random) -> Iterator[float]:
    """Seconds between attempts: doubling to a minute, each drawn from zero up ("full jitter").

    Agents that lost one server together don't come back together.
    """
    longest = FIRST_PAUSE_S
    while True:
        yield rng.uniform(0.0, longest)
        longest = min(2 * longest, LONGEST_PAUSE_S)


def error_of(error: BaseException, server: str) -> FedPEFTError:
    """What came back from the server or from the attempt to reach it, as one of our errors."""
    if isinstance(error, FedPEFTError):
        return error
    if not isinstance(error, grpc.aio.AioRpcError):
        return FederationError(f"{server}: the connection was lost ({type(error).__name__})")
    details = " ".join((error.details() or "").split())
    named = from_text(details)
    if named is not None:
        return named
    if error.code() == grpc.StatusCode.UNAVAILABLE:
        return _unreachable(details, server)
    if error.code() == grpc.StatusCode.UNIMPLEMENTED:
        return FederationError(f"{server} is no fedpeft server of this version; check address and versions")
    return FederationError(f"{server}: {error.code().name.lower()}: {details[:300]}")


def error_named(details: str) -> FedPEFTError:
    """An error from the server's words, "<class>: <reason>"."""
    return from_text(details) or FederationError(details[:300])


def is_final(error: FedPEFTError) -> bool:
    """Whether trying again cannot help until someone has changed something."""
    if isinstance(error, ValidityError):
        return False  # clocks are set, and certificates begin
    return isinstance(error, CredentialError | ProtocolError)


def _unreachable(details: str, server: str) -> FedPEFTError:
    lower = details.lower()
    # Whoever closes in the middle of a handshake without a word on certificates may be a relay whose server
    # is away: that mends itself, unlike a certificate that is refused.
    cut = any(word in lower for word in ("socket closed", "connection reset", "broken pipe"))
    if "not yet valid" in lower or "has expired" in lower or "certificate expired" in lower:
        return ValidityError(
            f"{server}: its certificate is not valid at {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, which this"
            " machine's clock says; set the clock, or tell the server's admin"
        )
    if "wrong_version_number" in lower:
        return CredentialError(
            f"{server} answers without TLS, as fedpeft server --insecure does; is this the right server?"
            " If so, ask it without certificates: no --keys, no FEDPEFT_KEYS, and for an agent --insecure"
        )
    if "certificate" in lower or (("handshake" in lower or "ssl" in lower) and not cut):
        return CredentialError(
            f"{server}: no trust between the two ends ({details[-120:]}); is this the right server?"
            " If so, enrol with a token of its admin"
        )
    if "dns" in lower or "name resolution" in lower or "resolve" in lower:
        return FederationError(f"{server}: there is no such host; check the address")
    if cut:
        return FederationError(
            f"{server} does not answer: it closed the connection; check the address, and whether that server"
            " has certificates, so that it needs --keys"
        )
    return FederationError(f"{server} does not answer; check the address, and that fedpeft server runs there")
