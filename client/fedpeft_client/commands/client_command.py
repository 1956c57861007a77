"""`fedpeft client`, `fedpeft client status` and `fedpeft client ledger`."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fedpeft.credentials import Material, Role, check_name, identity_of
from fedpeft.errors import CredentialError, UsageError
from fedpeft.runtime.files import make_private_folder
from fedpeft.runtime.safe_text import one_line, replace_unprintable
from fedpeft.runtime.telemetry import expose, set_up_log
from fedpeft_client.agent import Agent
from fedpeft_client.agent_metrics import AgentMetrics
from fedpeft_client.client_settings import ClientSettings, read_settings
from fedpeft_client.commands.ledger_lines import ledger_lines
from fedpeft_client.status import STATUS_FILE, read_status
from fedpeft_client.transport.device_certificate import has_unused_token, own_material, renew_if_due
from fedpeft_client.transport.egress import EGRESS_FILE, EgressLedger, read_ledger

LOG = logging.getLogger("fedpeft.client")
AGENTS = ".fedpeft"  # in the user's home: one folder per agent
KEYS = "keys"


def client_command(config: Path | None, given: Mapping[str, Any], token: str) -> None:
    """Be an agent until told to stop.

    Raises:
        UsageError: the settings contradict themselves.
        FedPEFTError: the first contact failed; see `fedpeft.errors`.
    """
    settings = read_settings(config, given)
    set_up_log(os.environ.get("FEDPEFT_LOG", "INFO"), settings.log, clock="%H:%M:%S")
    if settings.insecure and not _is_loopback(settings.host):
        raise UsageError(
            f"--insecure is plaintext and {settings.host} is another machine; enrol with --token instead"
        )
    asyncio.run(serve_agent(settings, token, _install_signal_handlers))


def client_status_command(home: Path | None, name: str, *, as_json: bool) -> None:
    """Print what an agent did and has spent.

    Raises:
        UsageError: several agents were started here, and none was named.
        StateError: none was.
    """
    table = read_status(home or _only_home(name))
    if as_json:
        print(json.dumps(table))
        return
    for label, text in _lines(table):
        print(f"{one_line(label):<13} {one_line(text)}")


def client_ledger_command(home: Path | None, name: str, *, as_json: bool, last: int) -> None:
    """Print what left the device: sums over everything, then the last messages.

    Args:
        as_json: print every line as it is in the file.
        last: how many messages.

    Raises:
        UsageError: several agents were started here, and none was named.
        StateError: none was.
    """
    entries = read_ledger(home or _only_home(name))
    if as_json:
        for entry in entries:
            print(json.dumps(entry))
        return
    for line in ledger_lines(entries, last):
        print(replace_unprintable(line))


async def serve_agent(settings: ClientSettings, token: str, made: Callable[[Agent], None]) -> None:
    """Be an agent until it is stopped.

    One whose certificate the server refuses enrols anew, where a token is left for that.

    Args:
        made: told of the agent before it dials.

    Raises:
        FedPEFTError: the first contact failed.
    """
    home = settings.home or Path.home() / AGENTS / check_name(settings.name or settings.data.stem)
    keys, refused = settings.keys or home / KEYS, False
    make_private_folder(home, holds="what left this device")
    while True:
        ledger = EgressLedger(home / EGRESS_FILE)
        material = None if settings.insecure else await _own_material(settings, keys, token, ledger, refused)
        name = (
            settings.name or settings.data.stem if material is None else _certificate_line(material, settings)
        )
        try:
            return await _work(settings, name, home, None if material is None else keys, ledger, made)
        except CredentialError as error:
            if refused or settings.insecure or not has_unused_token(keys, token):
                raise
            LOG.warning("%s; the token is used for a new certificate", error)
            refused = True


async def _own_material(
    settings: ClientSettings, keys: Path, token: str, ledger: EgressLedger, refused: bool
) -> Material:
    patience_s = settings.connect_s or math.inf
    return await own_material(
        keys, settings.server, token, patience_s=patience_s, ledger=ledger, refused=refused
    )


async def _work(
    settings: ClientSettings,
    name: str,
    home: Path,
    keys: Path | None,
    ledger: EgressLedger,
    made: Callable[[Agent], None],
) -> None:
    """Be an agent, with the certificate in `keys`, or in plaintext without one, until told to stop."""
    renewing = None if keys is None else lambda: renew_if_due(keys, settings.server, ledger)
    metrics = AgentMetrics()
    agent = Agent(settings, check_name(name), home, renewing, metrics=metrics, ledger=ledger)
    made(agent)
    with ExitStack() as stack:
        if settings.metrics:
            address, end = expose(metrics.registry, settings.metrics)
            stack.callback(end)
            LOG.info("metrics on http://%s/metrics", address)
        await agent.run()


def _install_signal_handlers(agent: Agent) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.stop)
    loop.add_signal_handler(signal.SIGUSR1, lambda: asyncio.ensure_future(agent.workshop.release()))


def _certificate_line(material: Material, settings: ClientSettings) -> str:
    who = identity_of(material.certificate)
    if who.role is not Role.AGENT:
        raise CredentialError(
            f"the certificate is that of {who.name!r}, who is {who.role}; an agent needs one of its own"
        )
    if settings.name not in ("", who.name):
        raise UsageError(
            f"--name is {settings.name!r} and the certificate says {who.name!r}; leave --name out"
        )
    return who.name


def _only_home(name: str) -> Path:
    agents = Path.home() / AGENTS
    if name:
        return agents / name
    found = sorted(path.parent for path in agents.glob(f"*/{STATUS_FILE}"))
    if len(found) > 1:
        raise UsageError(
            f"several agents were started here ({', '.join(p.name for p in found)}); give --name"
        )
    return found[0] if found else agents


def _lines(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    state = (
        table["state"] if table["running"] or table["state"] == "stopped" else "not running (it was killed)"
    )
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(table["since"]))
    lines = [
        ("agent", f"{table['agent']} of {table['server']}"),
        ("state", f"{state} since {since}" + (f"; {table['doing']}" if table["doing"] else "")),
        ("results", f"{table['results']} accepted, {table['refusals']} refused, {table['failures']} failed"),
        ("bytes", f"{table['bytes_up']} up, {table['bytes_down']} down, {table['bytes_today']} today"),
        ("epsilon", f"{table['epsilon']:.4g} at delta {table['delta']:g}, by this device's own ledger"),
        *((f"run {run['name']}", _run_line(run)) for run in table["runs"]),
    ]
    if table.get("certificate_ends"):
        ends = time.strftime("%Y-%m-%d", time.localtime(table["certificate_ends"]))
        lines.append(("certified", f"until {ends}, renewed before if the server can"))
    optional = {
        "base model": "base_digest",
        "last refusal": "last_refusal",
        "last error": "last_error",
        "the server": "notice",
    }
    return lines + [(label, _with_date(table, key)) for label, key in optional.items() if table.get(key)]


def _with_date(table: Mapping[str, Any], key: str) -> str:
    """A text with when it was; it may be of long ago."""
    at = table.get("at", {}).get(key)
    when = "" if at is None else time.strftime("%Y-%m-%d %H:%M:%S  ", time.localtime(at))
    return f"{when}{table[key]}"


def _run_line(run: Mapping[str, Any]) -> str:
    privacy = "no privacy promised"
    if run["epsilon"] is not None:
        privacy = f"{run['kind']}, epsilon {run['epsilon']:.4g}, paid up to round {run['paid_round']}"
    return f"{run['rounds']} rounds, the last is {run['last_round']}; {privacy}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
