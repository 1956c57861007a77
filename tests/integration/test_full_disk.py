"""The disk under a real server fills up in the middle of a run, and is cleared again.

The run pauses and says so, agents keep what they have trained, and what comes out in the end is what the same
run file gives undisturbed on one machine.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.site import AGENTS, PATIENCE_S, Site, begin, check_adapters, open_site, say, until

MEBIBYTES = 48  # what the run needs and some; the rest is taken away
SETTINGS = ("run.rounds=3", "training.steps=4", "evaluation.every=100")
FULL_S = 3.0


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site whose server keeps its state on a small disk of its own."""
    disk = tmp_path / "state"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={MEBIBYTES}m,mode=700", "tmpfs", str(disk)]
    try:
        subprocess.run(mounting, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"NOT TESTED: a whole run on a full disk; no small disk can be mounted here ({error})")
    try:
        with open_site(tmp_path) as made:
            yield made
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft calls it
def test_a_run_waits_for_space_and_ends_with_the_right_bytes(site: Site) -> None:
    run_id = begin(site, SETTINGS)

    until("the second round", lambda: site.open_round() > 1)
    filler = fill(site.folder / "state")
    say(f"the disk is full: {filler.stat().st_size >> 20} MiB of others in round {site.open_round()}")
    shown = until("a pause", lambda: paused(site, run_id))
    assert "space" in shown["detail"], shown
    stuck = site.open_round()
    time.sleep(FULL_S)
    assert paused(site, run_id)
    assert site.open_round() == stuck
    say(f"paused: {shown['detail']}")
    filler.unlink()

    until("the end", lambda: show(site, run_id)["status"] == "finished", 0.2)
    counted = site.asked("SELECT round, count(*), sum(counted) FROM updates GROUP BY round")
    assert counted == [(number, len(AGENTS), len(AGENTS)) for number in range(1, 4)]
    site.call("run", "pull", run_id, "--out", "pulled")
    assert site.processes["simulation"].wait(PATIENCE_S) == 0, site.log("simulation")
    check_adapters(site.folder, show(site, run_id))


def fill(folder: Path) -> Path:
    """A file that takes whatever is left."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for piece in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(bytes(piece))
            except OSError:
                continue
    return path


def show(site: Site, run_id: str) -> dict[str, str]:
    shown: dict[str, str] = json.loads(site.call("run", "show", run_id, "--json"))
    return shown


def paused(site: Site, run_id: str) -> dict[str, str]:
    """The run as it stands, if it is paused."""
    shown = show(site, run_id)
    return shown if shown["status"] == "paused" else {}
