"""Two ends one version apart work together; further apart, one line says who must be updated."""

from __future__ import annotations

import pytest

from fedpeft.errors import ProtocolError
from fedpeft.wire.protocol import PROTOCOL, ProtocolWindow

OLDER, NEWER, NEWEST = ProtocolWindow(3, 3), ProtocolWindow(3, 4), ProtocolWindow(4, 5)


@pytest.mark.parametrize(
    ("agent", "server", "spoken"),
    [(OLDER, NEWER, 3), (NEWER, OLDER, 3), (NEWER, NEWER, 4), (NEWEST, NEWER, 4), (NEWER, NEWEST, 4)],
)
def test_neighbours_speak_what_both_know(agent: ProtocolWindow, server: ProtocolWindow, spoken: int) -> None:
    assert agent.accept(server.answer(agent.newest)) == spoken


@pytest.mark.parametrize(
    ("agent", "server", "words"),
    [
        (
            OLDER,
            NEWEST,
            "protocol version 3 came and this server speaks 4 and 5; update fedpeft at the agent",
        ),
        (NEWEST, OLDER, "protocol version 5 came and this server speaks 3; update fedpeft at the server"),
        # The next version, of which the server can't know whether it still speaks this one:
        (
            ProtocolWindow(4, 4),
            OLDER,
            "the server speaks protocol version 3 and this agent 4; .* at the server",
        ),
    ],
)
def test_others_are_told_who_is_to_be_updated(
    agent: ProtocolWindow, server: ProtocolWindow, words: str
) -> None:
    with pytest.raises(ProtocolError, match=words):
        agent.accept(server.answer(agent.newest))


def test_an_agent_takes_no_version_that_it_does_not_know() -> None:
    with pytest.raises(ProtocolError, match="update fedpeft here"):
        PROTOCOL.accept(PROTOCOL.newest + 1)


def test_a_window_has_two_versions_at_most() -> None:
    for oldest, newest in ((0, 0), (3, 5), (4, 3)):
        with pytest.raises(ValueError, match="cannot be"):
            ProtocolWindow(oldest, newest)
