"""Certificates that end soon, said once a day while there is time to do something."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from fedpeft.credentials.certificates import ending_soon
from fedpeft_server.transport.sessions import AgentStatus, ServerStatus

_AGAIN = timedelta(days=1)


class ExpiryWatch:
    """Remembers what was said."""

    def __init__(self) -> None:
        self._said: dict[str, datetime] = {}  # by whose certificate it is; as many as there are agents

    def lines(self, server: ServerStatus, agents: Iterable[AgentStatus], now: datetime) -> list[str]:
        """What is to be said now: of the server, and of agents that have not renewed though they could."""
        ends = {"the server": server.certificate_ends}
        ends |= {f"agent {agent.name!r}": agent.certificate_ends for agent in agents if agent.connected}
        found = []
        for what, end in ends.items():
            if end is None or now - self._said.get(what, now - _AGAIN) < _AGAIN:
                continue
            line = ending_soon(datetime.fromtimestamp(end, UTC), now, what)
            if line is not None:
                self._said[what] = now
                found.append(line)
        return found
