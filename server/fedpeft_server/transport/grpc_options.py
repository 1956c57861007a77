"""How the server's connections are set up; every number has its reason."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import Message

from fedpeft.v1 import federation_pb2 as pb
from fedpeft.wire.protocol import PROTOCOL, ProtocolWindow

LONGEST_REQUEST = 256 * 1024  # of people: a run file
LONGEST_ANSWER = 8 << 20  # to people: the log's line of a round names its clients, 36,000 of them fit
SLACK_BYTES = 64 * 1024  # of a message beside a body or a chunk: names, digests, a signature, capabilities

ChannelOptions = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class TransportOptions:
    """Bounds and times of the transport.

    Attributes:
        host, port: where to listen; port 0 takes a free one.
        max_inline_bytes: larger bodies travel as blobs, so that no session's stream is held up by one.
        chunk_bytes: of blobs, at most: large enough that a chunk's fixed cost vanishes, small enough that
            what connections buffer stays small. Over slow lines chunks are smaller, see `Pace`.
        max_blob_bytes: no blob may be larger; runs have tighter bounds of their own.
        upload_credits, download_credits: blobs that may be under way at a time; the rest wait their turn, so
            that memory doesn't grow with the number of agents.
        heartbeat_s: agents say something at least as often; after three times as long without a word a
            connection is given up.
        stall_s: a peer that neither reads nor sends for so long in the middle of a blob loses its turn.
        turn_s: a blob's turn lasts as long while others wait for theirs; it goes on where it was, later. A
            minute carries 7 MiB over a line of 1 Mbit/s, and four peers that crawl delay others by no more.
        hello_s: a connection that doesn't introduce itself in time is closed.
        max_session_s: after so long an agent has to dial again, with the certificate that it has then.
        max_sessions: agents connected at a time.
        max_connections: of everyone; those with and without a call, so that descriptors and memory last.
        handshake_s: a connection that has not finished TLS by then is closed: 50 round trips of a poor line.
        idle_s: as is one without a call; commands of people take seconds, agents always have a session.
        max_streams: calls of one caller that are open at a time, over all its connections: a session, a few
            blobs, and a person's windows with logs.
        calls_per_s: of one caller, steadily; ten seconds' worth may come at once. A small run's round is two
            calls, and none has five a second.
        messages_per_s: in one agent's session, as calls. A task is two, and a heartbeat every few seconds.
        sessions_per_minute: of one agent; all of a minute may come at once. An agent that cannot stay dials
            some nine times in its first minute and once a minute later.
        bytes_per_hour: of one agent's bodies, both ways: 32 GiB fill a line of 75 Mbit/s.
        refusals_per_hour: of one caller, of those that speak against it: a sound agent has none. Beyond it no
            call is accepted until some of the hour is over.
        intake_bytes: of results that wait to be made durable; sessions aren't read from beyond it.
        drain_s: what running calls get at shutdown.
        protocol: the versions that this server speaks.
    """

    protocol: ProtocolWindow = PROTOCOL
    host: str = "127.0.0.1"
    port: int = 0
    max_inline_bytes: int = 64 * 1024
    chunk_bytes: int = 1024 * 1024
    max_blob_bytes: int = 4 << 30
    upload_credits: int = 4
    download_credits: int = 16
    heartbeat_s: float = 15.0
    stall_s: float = 30.0
    turn_s: float = 60.0
    hello_s: float = 10.0
    max_session_s: float = 86_400.0
    max_sessions: int = 4096
    max_connections: int = 8192
    handshake_s: float = 10.0
    idle_s: float = 120.0
    max_streams: int = 16
    calls_per_s: float = 20.0
    messages_per_s: float = 100.0
    sessions_per_minute: int = 60
    bytes_per_hour: int = 32 << 30
    refusals_per_hour: int = 60
    intake_bytes: int = 32 << 20
    drain_s: float = 5.0

    @property
    def max_received_bytes(self) -> int:
        """What gRPC reads at most: what is a little too long is counted with its sender, see `most_bytes`."""
        return max(self.max_inline_bytes, self.chunk_bytes, LONGEST_REQUEST) + 2 * SLACK_BYTES

    def most_bytes(self, message: type[Message]) -> int:
        """What one message of that class may weigh; a longer one is refused before it is parsed."""
        of_agents = {pb.AgentMessage: self.max_inline_bytes, pb.BlobUpload: self.chunk_bytes}
        return of_agents.get(message, LONGEST_REQUEST) + SLACK_BYTES


def server_channel_options(options: TransportOptions) -> ChannelOptions:
    """What gRPC is told, and why."""
    return (
        ("grpc.max_receive_message_length", options.max_received_bytes),
        ("grpc.max_send_message_length", LONGEST_ANSWER),
        ("grpc.max_metadata_size", 8192),  # ours is empty; a hostile caller's shall be small
        ("grpc.max_concurrent_streams", options.max_streams),
        ("grpc.max_allowed_incoming_connections", options.max_connections),
        ("grpc.server_handshake_timeout_ms", round(1000 * options.handshake_s)),
        ("grpc.max_connection_idle_ms", round(1000 * options.idle_s)),
        # What we send is compressed already. A bit set of 1 is "identity": nothing that came is unpacked.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        # Flow control as small as a few chunks: gRPC otherwise widens windows to what the network carries,
        # which for many uploads at once is gigabytes of buffers.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", 65536),
        ("grpc.tcp_max_read_chunk_size", 65536),
        # Notice peers that vanished without a word (a NAT that forgot them, a laptop that was closed).
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 0),
        # Agents behind NAT ping every 20 s; more often is abuse and ends the connection.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 4),
        ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a sharing of agents
    )
