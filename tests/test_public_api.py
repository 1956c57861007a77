"""The public Python API: its names, what a run gives, and a process that is left as it was found."""

from __future__ import annotations

import ast
import asyncio
import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fedpeft
from tests.simulation.conftest import tiny_tables
from tests.simulation.runs import fingerprint, simulated

ROOT = Path(__file__).resolve().parents[1]


def test_every_public_name_is_there_and_has_a_docstring() -> None:
    assert len(fedpeft.__all__) == len(set(fedpeft.__all__)) <= 45
    for name in fedpeft.__all__:
        found = getattr(fedpeft, name)
        assert name == "__version__" or (found.__doc__ or "").strip(), name
    with pytest.raises(AttributeError, match="'simulat'"):
        getattr(fedpeft, "simulat")  # noqa: B009 - a name that type checkers know is none


def test_type_checkers_see_the_same_names() -> None:
    stub = ast.parse((ROOT / "fedpeft" / "__init__.pyi").read_text(encoding="utf-8"))
    names = {
        alias.asname for node in ast.walk(stub) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert names == set(fedpeft.__all__) - {"__version__"}


def test_importing_it_loads_nothing_else() -> None:
    code = "import fedpeft, sys; print([m for m in sys.modules if m.split('.')[0] in ('fedpeft', 'torch')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['fedpeft']"


@pytest.mark.slow
def test_a_run_from_a_notebook_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    """Inside a running event loop; and its adapter is that of the command line's own engine."""
    tables = tiny_tables() | {"run": {"name": "tiny", "rounds": 2}}
    threads = max(2, torch.get_num_threads())
    torch.set_num_threads(threads)
    before = process_state()

    async def cell() -> fedpeft.Result:
        return fedpeft.simulate(tables, ["training.lr=7e-3"], out=tmp_path / "run")

    result = asyncio.run(cell())
    assert process_state() == before
    assert (
        fingerprint(result.folder)["adapter"]
        == fingerprint(simulated(tables, tmp_path / "c").folder)["adapter"]
    )
    assert [row["round"] for row in result.metrics] == [0, 1, 2]
    assert set(result.metrics[0]) == {"round", "exact-match", "loss"}
    assert result.finished is not None
    assert result.started.rounds == 2
    assert (result.adapter / "adapter_model.safetensors").is_file()
    assert result.report.is_file()
    pandas = pytest.importorskip("pandas")
    assert list(result.frame().index) == [0, 1, 2]
    assert isinstance(result.frame(), pandas.DataFrame)
    assert fedpeft.resume(result.folder).rows == result.rows
    torch.set_num_threads(1)


def process_state() -> tuple[object, ...]:
    return (
        torch.get_num_threads(),
        torch.get_rng_state().sum().item(),
        torch.is_grad_enabled(),
        random.getstate(),
        np.random.get_state()[1].sum().item(),  # type: ignore[index]
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
        dict(os.environ),
        logging.getLogger("flwr").level,
    )


def test_the_process_is_put_back_after_an_error_too() -> None:
    before = process_state()
    with pytest.raises(RuntimeError, match="inside"):
        change_the_process()
    assert process_state() == before


def change_the_process() -> None:
    with fedpeft.process_unchanged():
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_grad_enabled(False)
        torch.rand(3)
        random.random()
        os.environ["FEDPEFT_OF_A_TEST"] = "1"
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise RuntimeError("inside")


def test_problems_come_as_lines_and_as_an_error() -> None:
    wrong = {"run": {"name": "x", "rounds": 1}, "space": "nowhere"}
    (line,) = fedpeft.check(wrong)
    assert line.startswith("space: unknown kind 'nowhere'")
    assert fedpeft.check({"run": {"name": "x"}}) == ["run.rounds: is needed and missing"]
    with pytest.raises(fedpeft.RunFileError, match="unknown kind"):
        fedpeft.simulate(wrong, out="never-made")
    assert not Path("never-made").exists()
    run = fedpeft.load_run({"run": {"name": "x", "rounds": 1}}, ["run.rounds=3"])
    assert fedpeft.load_run(run, ["run.seed=4"]).run.rounds == 3


def test_a_server_is_asked_where_a_loop_runs_already() -> None:
    async def cell() -> None:
        server = fedpeft.connect("127.0.0.1:1")
        with pytest.raises(fedpeft.FederationError, match=r"127\.0\.0\.1:1"):
            server.status("nothing-1")

    asyncio.run(cell())
    with pytest.raises(fedpeft.UsageError, match="plaintext"):
        fedpeft.submit({"run": {"name": "x", "rounds": 1}}, server="example.org:1")
