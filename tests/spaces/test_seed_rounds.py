"""Rounds in seed space: what is folded in, what is refused, and what any number of workers agrees on."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedpeft.cli import main
from fedpeft.errors import ModelError
from fedpeft.flower.local_grid import LocalGrid
from fedpeft.flower.roster import roll_call
from fedpeft.flower.round_loop import Federation, initial_checkpoint, run_rounds
from fedpeft.flower.tasks import Task
from fedpeft.ledger import Checkpoint, RunFolder
from fedpeft.resident import load_resident
from fedpeft.runfile import build_run, run_digest
from fedpeft.spaces import build_space
from fedpeft.stages import build_stages
from fedpeft.workers import InlineWorkers
from tests.flower.test_round_loop import Recorder
from tests.models.tiny import tiny_base
from tests.simulation.runs import fingerprint, resumed, simulated
from tests.spaces.oracles import weight
from tests.spaces.seed_apps import MISBEHAVIOUR, SEEDS, SENT

APPS = "tests.spaces.seed_apps"


def held(app: str, rounds: int = 2) -> Recorder:
    tables = {
        "run": {"name": "seeds", "rounds": rounds},
        "training": {"kind": "zeroth-order"},
        "space": {"kind": "seed-scalars", "num_seeds": SEEDS},
    }
    run = build_run(tables, source="test")
    base = tiny_base("llama")
    base.get_parameter("model.norm.weight").requires_grad_(True)
    space = build_space(run, base)
    recorder, grid = Recorder(), LocalGrid(4, InlineWorkers(), f"{APPS}:{app}")
    federation = Federation(
        run=run,
        digest=run_digest(run),
        grid=grid,
        roster=roll_call(grid, Task(run_digest(run), 0, b""), expected=4),
        space=space,
        stages=build_stages(run),
        journal=recorder,
        observer=recorder,
        evaluate=lambda state: None,
        memory=grid,
    )
    run_rounds(federation, initial_checkpoint(federation, space.initial_state({})))
    return recorder


def test_honest_rounds_add_what_clients_send() -> None:
    checkpoints = held("honest", rounds=3).checkpoints
    assert [c.state["amounts"].tolist() for c in checkpoints] == [[n * s for s in SENT] for n in range(4)]
    assert len({c.state["fingerprint"].tobytes() for c in checkpoints}) == 4


@pytest.mark.parametrize("name", sorted(MISBEHAVIOUR))
def test_bad_scalars_are_refused_and_the_round_goes_on(name: str) -> None:
    recorder = held(f"with_{name}", rounds=1)
    assert recorder.checkpoints[-1].state["amounts"].tolist() == SENT
    outcomes = {outcome.client: outcome for outcome in recorder.checkpoints[-1].row.outcomes}
    _, status, words = MISBEHAVIOUR[name]
    assert outcomes["client-1"].status == status
    assert words in outcomes["client-1"].reason
    assert "\n" not in outcomes["client-1"].reason
    assert [outcomes[f"client-{n}"].status for n in (0, 2, 3)] == ["folded"] * 3


def tables_of(folder: Path, **space: Any) -> dict[str, Any]:
    rows = [{"prompt": f"say {i}\n", "answer": str(i)} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "run": {"name": "tiny", "rounds": 2},
        "peft": {"method": "ln-tuning"},
        "data": {
            "train": str(folder / "rows.jsonl"),
            "prompt": "{prompt}",
            "answer": "{answer}",
            "partitioner": {"kind": "linear", "clients": 3},
        },
        "training": {"kind": "zeroth-order", "steps": 4, "batch_size": 2, "lr": 3e-3},
        "space": {"kind": "seed-scalars", "num_seeds": 16, **space},
        "federation": {"quorum": 1.0},
        "evaluation": {"bootstrap": 2, "metrics": ["loss"], "every": 9},
    }


def last(out: Path) -> Checkpoint:
    with RunFolder.resume(out) as folder:
        checkpoint = folder.latest()
    assert checkpoint is not None
    return checkpoint


@pytest.mark.parametrize("mode", ["fedkseed", "fedkseed-pro", "common"])
def test_a_round_is_the_exact_weighted_mean_of_its_clients(mode: str, tmp_path: Path) -> None:
    tables = tables_of(tmp_path, mode=mode, **({"num_seeds": 4} if mode == "common" else {}))
    tables["run"]["rounds"] = 1
    simulated(tables, tmp_path / "run")
    resident = load_resident(build_run(tables, source="test"))
    start = resident.space.initial_state(resident.parameters)
    updates = [resident.train_client(index, 1, start, proximal_mu=0.0)[0] for index in range(3)]
    weights = [update.weight for update in updates]
    assert len(set(weights)) == 3
    came = last(tmp_path / "run").state["amounts"]
    for seed in range(len(updates[0].arrays["amounts"])):
        total = sum(w * int(u.arrays["amounts"][seed]) for w, u in zip(weights, updates, strict=True))
        assert came[seed] == round(Fraction(total, sum(weights)))  # ties to even, as ours
    assert np.count_nonzero(came) > 3


@pytest.mark.parametrize("projection", [None, "signs", "srht"])
def test_any_number_of_workers_and_a_restart_give_the_same_bytes(
    projection: str | None, tmp_path: Path
) -> None:
    tables = tables_of(tmp_path)
    if projection is not None:
        tables["space"] = {"kind": "projected", "num_seeds": 8, "projection": projection}
        tables["training"]["kind"] = "first-order"
    for workers in (1, 2):
        simulated(tables, tmp_path / str(workers), workers=workers)
    simulated(tables, tmp_path / "again")
    out = tmp_path / "again"
    (out / "checkpoints" / "round-000002.safetensors").unlink()
    (out / "report.html").unlink()
    resumed(out)  # a process that joins after round 1 with theta_0 and A
    assert fingerprint(tmp_path / "1") == fingerprint(tmp_path / "2") == fingerprint(out)
    assert last(out).state["amounts"].any()


@pytest.fixture
def replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["replay", str(tmp_path / "run"), "--out", str(tmp_path / "model"), *arguments])
        return int(stopped.value.code or 0), capsys.readouterr().err

    return run


def test_replay_writes_the_model_that_the_integers_say(
    tmp_path: Path, replayed: Callable[..., tuple[int, str]]
) -> None:
    tables = tables_of(tmp_path)
    simulated(tables, tmp_path / "run")
    amounts = last(tmp_path / "run").state["amounts"].tolist()
    assert replayed()[0] == 0
    written = load_file(tmp_path / "model" / "model.safetensors")
    from fedpeft.data.embedded import model_folder

    base = load_file(Path(str(model_folder())) / "model.safetensors")
    norms = sorted(name for name in base if "norm" in name)
    assert len(norms) == sum(not torch.equal(written[name], base[name].float()) for name in base)
    exponent = -17  # 2^-17 <= 3e-3 / 256 < 2^-16
    for number, name in enumerate(norms):
        for place in (0, base[name].numel() - 1):
            start = float(base[name][place])
            expected = weight(start, amounts, exponent, seed=0, tensor_id=number, place=place)
            assert written[name][place].numpy() == expected, (name, place)


def test_replay_refuses_what_it_must(tmp_path: Path, replayed: Callable[..., tuple[int, str]]) -> None:
    tables = tables_of(tmp_path)
    tables["run"]["rounds"] = 1
    simulated(tables, tmp_path / "run")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    assert "other files than a model" in replayed()[1]
    (tmp_path / "model" / "notes.txt").unlink()
    assert replayed()[0] == 0
    code, error = replayed()
    assert (code, "--force" in error) == (7, True)
    assert replayed("--force")[0] == 0


def test_replay_is_for_seed_spaces(tmp_path: Path, replayed: Callable[..., tuple[int, str]]) -> None:
    tables = tables_of(tmp_path)
    tables["space"] = {"kind": "adapter-delta"}
    tables["run"]["rounds"] = 1
    simulated(tables, tmp_path / "run")
    code, error = replayed()
    assert (code, "export --merge" in error) == (2, True)


def test_an_agent_with_other_weights_refuses_to_train(tmp_path: Path) -> None:
    run = build_run(tables_of(tmp_path), source="test")
    state = load_resident(run).space.initial_state({})
    other = load_resident(run.model_copy(update={"run": run.run.model_copy(update={"name": "other"})}))
    altered = dict(state, fingerprint=np.array(state["fingerprint"])[::-1])
    with pytest.raises(ModelError, match="nothing was trained"):
        other.train_client(0, 1, altered, proximal_mu=0.0)
