"""A real federation on loopback, as people start it: certificates, a server, three agents with rows.

One agent is killed while it trains, the server while a round is open. What is pulled at the end is what the
same run file gives undisturbed on one machine.
"""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.site import AGENTS, PATIENCE_S, Site, begin, check_adapters, open_site, say, until

ROUNDS = 8
SETTINGS = (f"run.rounds={ROUNDS}", "training.steps=4", "evaluation.every=100")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with open_site(tmp_path) as made:
        yield made


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft calls it
def test_killed_agents_and_a_killed_server_change_nothing(site: Site) -> None:
    run_id = begin(site, SETTINGS)
    site.start("lines", "run", "logs", run_id, "--follow")
    say(f"submitted {run_id}")

    kill_an_agent_at_work(site, "south")
    status = json.loads(site.call("client", "status", "--home", "homes/south", "--json"))
    assert (status["running"], status["state"]) == (False, "connected")
    site.start_agent("south")

    kill_the_server_in_a_round(site)
    site.start_server()

    assert site.processes["lines"].wait(PATIENCE_S) == 0, site.log("lines")
    assert site.log("lines").splitlines()[-1].endswith("finished"), site.log("lines")
    say("finished")
    counted = site.asked("SELECT round, count(*), sum(counted) FROM updates GROUP BY round")
    assert counted == [(number, 3, 3) for number in range(1, ROUNDS + 1)]
    assert site.asked("SELECT count(*) FROM updates WHERE length(signature) = 0") == [(0,)]

    site.call("run", "pull", run_id, "--out", "pulled")
    assert site.processes["simulation"].wait(PATIENCE_S) == 0, site.log("simulation")
    check_adapters(site.folder, json.loads(site.call("run", "show", run_id, "--json")))
    for name in (*AGENTS, "server"):
        site.processes[name].send_signal(signal.SIGTERM)
        assert site.processes[name].wait(30) == 0, site.log(name)
        assert "Traceback" not in site.log(name)


def kill_an_agent_at_work(site: Site, name: str) -> None:
    """kill -9 while it trains; the others' updates of that round are there, its own is not."""
    while True:
        until("training", lambda: site.open_round() > 1 and site.doing(name).startswith("train"))
        number = site.open_round()
        site.kill(name)
        if number and name not in site.came(number):
            break
        site.start_agent(name)  # its update was through already
    until("the others", lambda: len(site.came(number)) == len(AGENTS) - 1, 0.05)
    assert (site.open_round(), name in site.came(number)) == (number, False)
    say(f"{name} was killed in round {number}; the others' updates wait for it")


def kill_the_server_in_a_round(site: Site) -> None:
    """kill -9 while a round is open and an update is still missing."""
    last = site.open_round()
    while True:
        until("the next round", functools.partial(in_a_later_round, site, last))
        site.kill("server")
        number = site.open_round()
        came = site.came(number)
        if number and len(came) < len(AGENTS):
            say(f"the server was killed in round {number} with {len(came)} of {len(AGENTS)} updates")
            return
        last = number  # between two rounds
        site.start_server()


def in_a_later_round(site: Site, last: int) -> bool:
    return site.open_round() > last and bool(site.doing("north") and site.doing("east"))
