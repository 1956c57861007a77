"""The memory estimate against optimisers and training steps that really run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fedpeft.config.run_file import build_run
from fedpeft.config.sections import TrainingSection
from fedpeft.planning.memory import (
    OPTIMIZER_BYTES,
    BatchShape,
    Memory,
    ModelSizes,
    activations,
    on_gpu,
    optimizer_bytes,
)
from fedpeft.training.lean import PAGED
from fedpeft.training.optimizers import OPTIMIZERS, build_optimizer

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPES: list[tuple[int, ...]] = [(16, 8), (8,), (2, 3, 5), (20, 240), (300, 14)]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - set(PAGED)))
def test_optimizer_bytes_are_what_torch_keeps(name: str, momentum: float) -> None:
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes", reason="needs the extra 'quant'")
    section = TrainingSection(optimizer=name, momentum=momentum)
    parameters = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
    optimizer = build_optimizer(section, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [
        v for state in optimizer.state.values() for k, v in state.items() if k != "step" and "qmap" not in k
    ]
    assert optimizer_bytes(section, SHAPES) == sum(v.nbytes for v in kept if isinstance(v, torch.Tensor))
    assert set(OPTIMIZER_BYTES) == set(OPTIMIZERS)


def test_activations_by_hand() -> None:
    shape = ModelSizes(
        layers=2,
        hidden=8,
        keys=4,
        inner=16,
        gated=True,
        heads=2,
        vocabulary=10,
        virtual_tokens=1,
        fused_attention=False,
    )
    batch = BatchShape(rows=3, tokens=4, scored=6)
    layer = 6 * 8 + 2 * 4 + 4 * 16 + 3 * 2 * 5  # per token; five tokens with the virtual one
    head = 2 * (15 + 6) * 10
    plain, saving = TrainingSection(), TrainingSection(gradient_checkpointing=True)
    assert activations(shape, batch, plain, language=True) == 4 * (15 * 2 * layer + head)
    assert activations(shape, batch, plain, language=False) == 4 * 15 * 2 * layer
    assert activations(shape, batch, saving, language=False) == 4 * 15 * (2 * 8 + layer)
    plainer = replace(shape, gated=False, fused_attention=True)
    assert activations(plainer, batch, plain, language=False) == 4 * 15 * 2 * (6 * 8 + 2 * 4 + 2 * 16)


def test_a_gpu_holds_what_trains_and_no_messages() -> None:
    parts = {"gradients": 30, "optimizer": 60, "proximal": 0, "activations": 500, "evaluation": 90}
    whole = Memory(base=1000, adapter=30, state=60, exchange=9000, overlap=30, allocator=700, peak=0, **parts)
    plain, scalars = (
        build_run({"run": {"name": "x", "rounds": 1}, "space": {"kind": kind}}, source="test")
        for kind in ("adapter-delta", "seed-scalars")
    )
    assert on_gpu(whole, plain).peak == 1000 + 30 + (30 + 60 + 500 - 30)
    assert on_gpu(whole, scalars).peak == on_gpu(whole, plain).peak + 60, "theta_0 and sums are there"


def measured(run_file: str, *overrides: str, mapped: bool) -> dict[str, int]:
    """One step in a process of its own. `mapped`: blocks from 64 KiB are mappings and go when freed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    environment["GLIBC_TUNABLES"] = "glibc.malloc.mmap_threshold=65536" if mapped else ""
    script = Path(__file__).with_name("measure_step.py")
    command = [sys.executable, str(script), run_file, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def check(run_file: str, *overrides: str) -> None:
    """The tolerance that `fedpeft.planning.memory` promises."""
    result = measured(run_file, *overrides, mapped=True)
    assert 0.75 < result["grown"] / result["alive"] < 1.25
    result = measured(run_file, *overrides, mapped=False)
    assert result["grown"] > 0.75 * result["alive"]
    assert result["grown"] < 1.25 * (result["alive"] + result["allocator"])


needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or not os.access("/proc/self/clear_refs", os.W_OK),
    reason="peak memory is measured through Linux's /proc",
)


@needs_glibc
@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [16, pytest.param(64, marks=pytest.mark.exhaustive)])
def test_estimate_for_the_embedded_model(batch_size: int) -> None:
    items = ("data.limit=512", "data.partitioner.clients=2", f"training.batch_size={batch_size}")
    check("demo", *items)


@pytest.mark.exhaustive
@needs_glibc
@pytest.mark.slow
def test_estimate_for_clipped_sums_of_gradients() -> None:
    """Rows go one at a time and are short: with a large adapter, gradients and sums are most of it."""
    private = {
        "kind": "record-level",
        "max_grad_norm": 1.0,
        "noise_multiplier": 1.0,
        "sample_rate": 1.0,
        "expected_batch_size": 8.0,
        "target_delta": 1e-5,
        "max_epsilon": 1e6,
    }
    items = [f"privacy.{key}={json.dumps(value)}" for key, value in private.items()]
    sizes = ("data.limit=512", "data.partitioner.clients=2", "training.batch_size=32")
    check("demo", *sizes, "training.steps=1", "peft.r=128", *items)


@needs_glibc
@pytest.mark.slow
@pytest.mark.exhaustive
def test_estimate_for_a_small_story_teller(shared_dir: Path) -> None:
    run = REPOSITORY / "simulations" / "dolly_stories260k.toml"
    check(str(run), "data.limit=1000")
