"""Offsite tuning over gRPC: agents hold an emulator and nothing else, and bytes are those of one machine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from fedpeft.commands.emulator import plug_in_command
from fedpeft.config.device_task import device_task
from fedpeft.config.run_file import build_run
from fedpeft.config.sections import ModelSection, RunConfig
from fedpeft.data.embedded import make_federated_rows, model_folder
from fedpeft.flower.server_app import execute_rounds
from fedpeft.models.base_model import load_tokenizer
from fedpeft.models.export import adapter_digest, export_adapter
from fedpeft.models.offsite import make_emulator, whole_model
from fedpeft.participant.load_server import load_serving_run
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.participant.loaded_run import LoadedRun
from fedpeft.transport.roster import Roster, roll_call
from fedpeft.transport.tasks import Task
from fedpeft.updates.update import Arrays
from fedpeft_server.transport.grpc_grid import RunIdentity
from tests.server.fleet import server
from tests.server.test_grpc_equivalence import Notes, agents, locally, serving

SITES = ("site-0", "site-1")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Rows of each site, a test set, the owner's full model, and the emulator that clients are given."""
    train, test = make_federated_rows(0, len(SITES), 24, 4)
    (tmp_path / "train").mkdir()
    for number, site in enumerate(SITES):
        lines = [json.dumps(asdict(row)) for row in train if row.client == number]
        (tmp_path / "train" / f"{site}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(asdict(row)) + "\n" for row in test))
    full = str(model_folder())
    make_emulator(whole_model(full, "causal-lm"), tmp_path / "emulator", path=full, pad=1, middle=1)
    load_tokenizer(ModelSection()).save_pretrained(tmp_path / "emulator")
    return tmp_path


def run_of(place: Path, train: Path) -> RunConfig:
    """On a quantised emulator, with a start that is computed once: agents' machines need not agree on it."""
    tables = {
        "run": {"name": "offsite", "rounds": 2},
        "model": {"path": str(place / "emulator"), "quantization": "rtn4"},
        "peft": {"method": "lora", "r": 4, "init_lora_weights": "lq-lora", "loftq_config": {"loftq_iter": 2}},
        "data": {
            "train": str(train),
            "test": str(place / "test.jsonl"),
            "prompt": "{prompt}",
            "answer": "{answer}",
            "max_length": 128,
            "partitioner": {"kind": "files"},
        },
        "training": {"steps": 2, "batch_size": 4, "lr": 5e-3},
    }
    return build_run(tables, source="test")


def plugged(resident: LoadedRun, state: Arrays, place: Path, name: str) -> str:
    """Digest of the full model's adapter that a state gives."""
    resident.space.enter(resident.parameters, state)
    export_adapter(resident.model, place / name, base_name=str(place / "emulator"))
    out = place / f"{name}-plugged"
    plug_in_command(place / name, place / "emulator", str(model_folder()), out, force=False)
    return adapter_digest(out)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_agents_with_an_emulator_give_the_bytes_of_one_machine(place: Path) -> None:
    here = locally(run_of(place, place / "train"))
    run, notes = run_of(place, place / "nowhere"), Notes()
    holder, told = load_serving_run(run), device_task(run)
    with (
        server(max_inline_bytes=8192) as running,
        agents(running.address, place, SITES, place / "emulator"),
    ):
        grid = running.grid(RunIdentity("run-1", told.digest))

        def gather(task: Task) -> Roster:
            assert len(task.start) > 8192, "it goes the way of blobs"
            return roll_call(grid, task, expected=len(SITES), timeout_s=120.0)

        execute_rounds(serving(holder, notes), grid, None, gather=gather, device_task=told.text)
    assert notes.states == here.states
    assert len(set(here.states)) == 3
    for site in SITES:
        (kept,) = (place / "homes" / site / "starts").iterdir()
        digest = hashlib.sha256(holder.start_bytes).hexdigest()
        assert kept.name == f"{told.digest}-{digest}.start"
        assert kept.read_bytes() == holder.start_bytes
        status = json.loads((place / "homes" / site / "status.json").read_text())
        assert status["base_digest"] == holder.base_digest, "the emulator's, after its start"
    layers = len({name.split(".layers.")[1].split(".")[0] for name in here.committed[-1].state})
    assert layers == 2, "the outer layers alone are trained"
    mine = plugged(
        load_simulated_run(run_of(place, place / "train")), here.committed[-1].state, place, "here"
    )
    assert plugged(holder, notes.committed[-1].state, place, "there") == mine
