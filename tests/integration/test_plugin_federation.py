"""A federation of real processes whose run uses a package of others, installed at every end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.site import AGENTS, PATIENCE_S, RUN_FILE, check_adapters, open_site, provision, until
from tests.support.plugins import install_example

SETTINGS = ("run.rounds=2", "training.steps=2", "evaluation.every=100", 'stages=[{kind="halve"}]')
PLUGIN = ("federation.strategy=slow-start",)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_run_with_a_plugin_by_a_server_with_agents_is_the_simulation(tmp_path: Path) -> None:
    """An owner lists the package late: until then its agent refuses, and the run waits."""
    words = [word for setting in (*SETTINGS, *PLUGIN) for word in ("--set", setting)]
    with open_site(tmp_path / "site") as site:
        site.folder.mkdir()
        site.packages = (install_example(tmp_path / "packages"),)
        provision(site)
        site.start("simulation", "simulate", RUN_FILE, *words, "--out", "simulated", "--workers", "1")
        site.start_server()
        listing = site.folder / "listing.toml"
        listing.write_text('[policy]\nplugins = ["fedpeft-example"]\n')
        for name in AGENTS[:-1]:
            site.start_agent(name, "--config", str(listing))
        site.start_agent(AGENTS[-1])
        until("the server", lambda: "listening on" in site.log("server"))
        run_id = json.loads(site.call("run", "submit", RUN_FILE, *words, "--json"))["id"]
        until("the refusal", lambda: "which policy.plugins does not list" in site.log(AGENTS[-1]))
        site.kill(AGENTS[-1])
        site.start_agent(AGENTS[-1], "--config", str(listing))
        until("the end", lambda: _status(site.call("run", "show", run_id, "--json")) == "finished", 0.5)
        site.call("run", "pull", run_id, "--out", "pulled")
        assert site.processes["simulation"].wait(PATIENCE_S) == 0, site.log("simulation")
        check_adapters(site.folder, json.loads(site.call("run", "show", run_id, "--json")))


def _status(shown: str) -> str:
    return str(json.loads(shown)["status"])
