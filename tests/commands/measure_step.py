"""Run as a script: estimate one training step of a run, make it, and print both as JSON.

Resident memory is the kernel's peak (VmHWM, reset before the step). A step on one short row comes first, so
that what libraries set up at their first use is not counted.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

from fedpeft.commands.arguments import run_of
from fedpeft.config.sections import RecordLevelPrivacy
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.participant.loaded_run import LoadedRun
from fedpeft.planning.memory import estimate_memory
from fedpeft.privacy.noise_sources import noise_source
from fedpeft.simulation.engine import run_metrics
from fedpeft.training.first_order import Rows, train


def status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def step(resident: LoadedRun, row: int, count: int) -> None:
    rows = resident.rows(resident.data.rows, np.full(count, row, dtype=np.int64))
    if isinstance(resident.run.privacy, RecordLevelPrivacy):
        private_step(resident, rows)
        return
    train(
        resident.model,
        resident.parameters,
        rows,
        resident.run.training,
        steps=1,
        rng=np.random.default_rng(0),
    )


def private_step(resident: LoadedRun, rows: Rows) -> None:
    """Every row is drawn: the run's sample rate is 1."""
    from fedpeft.training.private import PrivateTrainingInputs, train_by_gradients

    run = resident.run
    assert isinstance(run.privacy, RecordLevelPrivacy)
    source = noise_source(run, "train", "site", 1)
    told = PrivateTrainingInputs(rows, run.training, run.privacy, np.random.default_rng(0), source)
    train_by_gradients(resident.model, resident.parameters, told)


def main(run_file: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    run = run_of(Path(run_file) if run_file != "demo" else None, overrides)
    resident = load_simulated_run(run)
    estimate = estimate_memory(run, resident.model, resident.data, run_metrics(run))
    held = np.concatenate([client.train for client in resident.data.clients])
    lengths = resident.data.rows.lengths[held]
    step(resident, int(held[lengths.argmin()]), 1)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    step(resident, int(held[lengths.argmax()]), run.training.batch_size)
    grown = status("VmHWM") - before
    print(json.dumps({"grown": grown, "alive": estimate.phases[0], "allocator": estimate.allocator}))


if __name__ == "__main__":
    main(*sys.argv[1:])
