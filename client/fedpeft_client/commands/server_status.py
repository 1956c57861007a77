"""`fedpeft server status`: who is there, what each used, what was refused and why."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpeft.reporting.text import printable
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_client.transport.admin_client import AdminClient, run_and_answer


def server_status_command(desk: AdminClient, *, as_json: bool) -> None:
    """Print a server's agents and its refusals.

    Raises:
        FedPEFTError: what the server answered.
    """
    reply = run_and_answer(desk.call(lambda stub: stub.ListAgents(pb.ListAgentsRequest())))
    if as_json:
        print(json.dumps(status_table(reply)))
        return
    info = reply.server
    started = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.started_ms / 1000))
    print(f"server     {printable(info.version)}, since {started}")
    print(f"agents     {info.connected} connected, at most {info.max_agents}")
    if info.certificate_ends_ms:
        print(f"certified  until {_day(info.certificate_ends_ms)}")
    if not reply.counted:
        print("counted    for admins alone: what each agent did tells who took part in a round")
        _print_outline(reply)
        return
    print(f"refused    {_counts(info.refused)}")
    if info.refused_nameless:
        print(f"           of these to callers without a name: {_counts(info.refused_nameless)}")
    _print_agents(reply)


def status_table(reply: pb.ListAgentsReply) -> Mapping[str, Any]:
    """A server's standing as plain values; times are seconds since 1970."""
    info = reply.server
    return {
        "counted": reply.counted,
        "server": {
            "version": info.version,
            "started": info.started_ms / 1000,
            "certificate_ends": _seconds(info.certificate_ends_ms),
            "connected": info.connected,
            "max_agents": info.max_agents,
            "refused": dict(info.refused),
            "refused_nameless": dict(info.refused_nameless),
        },
        "agents": [
            {
                "name": agent.name,
                "connected": agent.connected,
                "revoked": agent.revoked,
                "address": agent.address,
                "last_seen": _seconds(agent.last_seen_ms),
                "capabilities": dict(agent.capabilities),
                "results": agent.results,
                "calls": agent.calls,
                "bytes_up": agent.bytes_up,
                "bytes_down": agent.bytes_down,
                "certificate_ends": _seconds(agent.certificate_ends_ms),
                "refused": dict(agent.refused),
                "refusals": agent.refusals,
                "last_refusal": agent.last_refusal,
            }
            for agent in reply.agents
        ],
    }


def _print_outline(reply: pb.ListAgentsReply) -> None:
    if not reply.agents:
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("agent", "state", "certified until"):
        table.add_column(column)
    for agent in reply.agents:
        ends = _day(agent.certificate_ends_ms) if agent.certificate_ends_ms else ""
        table.add_row(printable(agent.name), _state(agent), ends)
    Console(file=sys.stdout, highlight=False).print(table)


def _state(agent: pb.AgentInfo) -> str:
    seen = time.strftime("%Y-%m-%d %H:%M", time.localtime(agent.last_seen_ms / 1000))
    return "revoked" if agent.revoked else "connected" if agent.connected else f"away since {seen}"


def _print_agents(reply: pb.ListAgentsReply) -> None:
    if not reply.agents:
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("agent", "state", "results", "MiB up", "MiB down", "certified until", "refused"):
        table.add_column(column, no_wrap=column != "refused")
    for agent in reply.agents:
        table.add_row(
            printable(agent.name),
            _state(agent),
            str(agent.results),
            f"{agent.bytes_up / 2**20:.1f}",
            f"{agent.bytes_down / 2**20:.1f}",
            _day(agent.certificate_ends_ms) if agent.certificate_ends_ms else "",
            Text(_counts(agent.refused)),
        )
    Console(file=sys.stdout, highlight=False).print(table)


def _counts(refused: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {printable(reason)}" for reason, count in sorted(refused.items())) or "nothing"


def _day(milliseconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(milliseconds / 1000))


def _seconds(milliseconds: int) -> float | None:
    return milliseconds / 1000 if milliseconds else None
