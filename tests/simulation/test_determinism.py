"""One seed, one result: whatever the number of workers and the engine."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.simulation.runs import fingerprint, simulated


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(tables: dict[str, Any], tmp_path: Path) -> None:
    tables["evaluation"]["baselines"] = True
    prints = []
    for workers in (1, 2, 3):
        simulated(tables, tmp_path / str(workers), workers=workers)
        prints.append(fingerprint(tmp_path / str(workers)))
    assert prints[0] == prints[1] == prints[2]


def test_another_seed_gives_other_bytes(tables: dict[str, Any], tmp_path: Path) -> None:
    tables["run"]["rounds"] = 1
    simulated(tables, tmp_path / "a")
    tables["run"]["seed"] = 1
    simulated(tables, tmp_path / "b")
    assert fingerprint(tmp_path / "a")["adapter"] != fingerprint(tmp_path / "b")["adapter"]


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="NOT TESTED: Flower's engine, the extra 'ray' is not installed",
)
def test_flowers_simulation_engine_gives_the_same_bytes(tables: dict[str, Any], tmp_path: Path) -> None:
    simulated(tables, tmp_path / "local", workers=2)
    script = (
        "import json, sys; from pathlib import Path; from tests.simulation.runs import simulated\n"
        "simulated(json.loads(sys.argv[1]), Path(sys.argv[2]), workers=2, engine='ray')"
    )
    done = subprocess.run(  # a process of its own, as Ray leaves threads and handlers behind
        [sys.executable, "-c", script, json.dumps(tables), str(tmp_path / "ray")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert fingerprint(tmp_path / "ray") == fingerprint(tmp_path / "local")
