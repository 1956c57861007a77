"""A client on a GPU: the start and the state of the CPU, and a round of every kind of trainer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.config.run_file import build_run
from fedpeft.errors import RunFileError
from fedpeft.models.export import adapter_digest, export_adapter
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.participant.loaded_run import LoadedRun, set_loaded_run
from fedpeft.updates.update import Arrays, Update
from tests.simulation.runs import simulated

# bitsandbytes warns at each 8-bit product that it casts to float16.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")

FEW: dict[str, Any] = {
    "run": {"name": "on-a-gpu", "rounds": 1},
    "model": {"device": "cuda"},
    "peft": {"method": "lora", "r": 4},
    "data": {
        "limit": 64,
        "test_limit": 8,
        "max_length": 96,
        "partitioner": {"kind": "iid", "clients": 2},
    },
    "training": {"steps": 3, "batch_size": 4, "lr": 5e-3},
    "evaluation": {"bootstrap": 20, "metrics": ["token-accuracy"]},
}
BASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "nf4": {"quantization": "nf4"},
    "int8": {"quantization": "int8"},
    "rtn4": {"quantization": "rtn4"},
}
CLOSE = {"float32": 1e-2, "bfloat16": 0.3, "nf4": 0.1, "int8": 0.3, "rtn4": 0.1}
"""Largest distance between the two devices' changes over the change itself; Adam magnifies what is tiny."""

ZEROTH = {
    "training": {"kind": "zeroth-order", "steps": 4, "batch_size": 4, "lr": 1e-2, "radius": 1e-3},
    "space": {"kind": "seed-scalars", "num_seeds": 16},
}
PRIVATE = {
    "privacy": {
        "kind": "record-level",
        "max_grad_norm": 1.0,
        "noise_multiplier": 1.0,
        "sample_rate": 0.2,
        "expected_batch_size": 5.0,
        "target_delta": 1e-5,
        "max_epsilon": 50.0,
        "seeded": True,
    }
}


def loaded(device: str, **sections: dict[str, Any]) -> LoadedRun:
    tables = {**copy.deepcopy(FEW), **sections}
    tables["model"] = {**tables["model"], "device": device}
    return load_simulated_run(build_run(tables, source="test"))


def start(resident: LoadedRun) -> Arrays:
    return resident.space.initial_state(resident.parameters)


def trained(resident: LoadedRun) -> Update:
    return resident.train_client(0, 1, start(resident), proximal_mu=0.0)[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_run_that_asks_for_cuda_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    tables = {**FEW, "model": {"device": "cuda", "path": str(tmp_path / "nothing")}}
    with pytest.raises(RunFileError, match=r"run file: model\.device 'cuda': ") as refusal:
        load_simulated_run(build_run(tables, source="test"))
    assert len(refusal.value.problems) == 1


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and to be asked for: pytest -m gpu")
    return "cuda"


@pytest.mark.gpu
@pytest.mark.parametrize("base", BASES)
def test_a_round_on_a_gpu_starts_alike_and_ends_nearby(cuda: str, base: str) -> None:
    here, there = (loaded(device, model=BASES[base]) for device in ("cpu", cuda))
    assert there.device.type == "cuda"
    assert {parameter.device.type for parameter in there.model.parameters()} == {"cuda"}
    assert there.base_digest == here.base_digest
    assert {n: a.tobytes() for n, a in start(there).items()} == {
        n: a.tobytes() for n, a in start(here).items()
    }
    ours, theirs = trained(here).arrays, trained(there).arrays
    assert list(ours) == list(theirs)
    gap = sum(float(np.square(theirs[name] - array).sum()) for name, array in ours.items())
    size = sum(float(np.square(array).sum()) for array in ours.values())
    assert size > 0
    assert (gap / size) ** 0.5 < CLOSE[base]


@pytest.mark.gpu
@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_one_state_scores_and_exports_alike(cuda: str, base: str, tmp_path: Path) -> None:
    here, there = (loaded(device, model=BASES[base]) for device in ("cpu", cuda))
    state = here.space.apply(start(here), {n: a.astype(float) for n, a in trained(here).arrays.items()})
    batches = here.batches(here.data.test, np.arange(len(here.data.test)))
    scores = [r.score(r.data.test, batches, state, ("loss", "rouge-l"))["nll"] for r in (here, there)]
    np.testing.assert_allclose(scores[1], scores[0], rtol=2e-2)
    for resident, name in ((here, "here"), (there, "there")):
        resident.space.enter(resident.parameters, state)
        export_adapter(resident.model, tmp_path / name, base_name="embedded")
    assert adapter_digest(tmp_path / "there") == adapter_digest(tmp_path / "here")


@pytest.mark.gpu
@pytest.mark.parametrize("base", ["float32", "nf4"])
def test_scalars_of_a_gpu_lead_a_cpu_to_the_same_bits(cuda: str, base: str) -> None:
    here, there = (loaded(device, model=BASES[base], **ZEROTH) for device in ("cpu", cuda))
    update = trained(there)
    assert any(array.any() for array in update.arrays.values())
    after = there.space.apply(start(there), {n: a.astype(float) for n, a in update.arrays.items()})
    here.space.enter(here.parameters, after)  # compares its weights with the other device's fingerprint
    again = here.space.apply(start(here), {n: a.astype(float) for n, a in update.arrays.items()})
    assert {n: a.tobytes() for n, a in again.items()} == {n: a.tobytes() for n, a in after.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("space", ["signs", "srht"])
def test_projected_changes_of_a_gpu_lead_a_cpu_to_the_same_bits(cuda: str, space: str) -> None:
    section = {"kind": "projected", "projection": space, "num_seeds": 32}
    here, there = (loaded(device, space=section) for device in ("cpu", cuda))
    update, _ = there.train_client(0, 1, start(there), proximal_mu=0.0)
    change = {name: array.astype(float) for name, array in update.arrays.items()}
    after = there.space.apply(start(there), change)
    here.space.enter(here.parameters, after)
    assert here.space.apply(start(here), change)[next(iter(change))].tobytes() == next(
        iter(after[name].tobytes() for name in change)
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "training",
    [
        {"precision": "bf16"},
        {"gradient_checkpointing": True},
        {"activation_offload": True},
        {"optimizer": "paged-adamw8bit"},
        {"optimizer": "galore", "projection_rank": 2},
        {"fused_update": True},
        {"sampled_layers": 2},
    ],
    ids=str,
)
def test_lean_trainers_on_a_gpu(cuda: str, training: dict[str, Any]) -> None:
    arrays = trained(loaded(cuda, training={**FEW["training"], **training})).arrays
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert any(array.any() for array in arrays.values())


@pytest.mark.gpu
def test_private_training_on_a_gpu(cuda: str) -> None:
    arrays = trained(loaded(cuda, **PRIVATE)).arrays
    assert all(np.isfinite(array).all() for array in arrays.values())
    assert any(array.any() for array in arrays.values())


@pytest.mark.gpu
def test_a_whole_run_on_a_gpu(cuda: str, tmp_path: Path) -> None:
    simulated(copy.deepcopy(FEW), tmp_path / "run", workers=2)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["device"] == "cuda:0"
    assert rows[-1]["peak_device_mib"] > 0
    held = torch.cuda.memory_reserved()
    set_loaded_run(load_simulated_run(build_run({**FEW, "model": {"device": "cpu"}}, source="test")))
    assert torch.cuda.memory_reserved() < held
