"""Rounds in seed space: what is folded in, what is refused, and what any number of workers agrees on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedpeft.cli import main
from fedpeft.config.run_file import build_run, run_digest
from fedpeft.errors import ModelError
from fedpeft.flower.local_grid import LocalGrid
from fedpeft.flower.server_app import RoundServer, execute_rounds
from fedpeft.ledger import Checkpoint, RunFolder
from fedpeft.ledger.records import Round
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.planning.preflight import problems_of
from fedpeft.reporting.progress import make_progress
from fedpeft.rounds.round_context import RoundContext
from fedpeft.rounds.round_loop import initial_checkpoint, run_rounds
from fedpeft.simulation.engine import Deployment, execute_run
from fedpeft.spaces import build_space
from fedpeft.stages import build_stages
from fedpeft.transport.roster import roll_call
from fedpeft.transport.tasks import Task
from fedpeft.wire.codec import Envelope, encode
from fedpeft.workers import InlineWorkers, Workers
from tests.flower.test_round_loop import Recorder
from tests.models.tiny import tiny_base
from tests.simulation.runs import fingerprint, resumed, simulated
from tests.spaces.oracles import weight
from tests.spaces.seed_apps import MISBEHAVIOUR, SEEDS, SENT, VARIED

APPS = "tests.spaces.seed_apps"


def held(
    app: str, rounds: int = 2, start: list[int] | None = None, mode: str = "fedkseed", **strategy: Any
) -> Recorder:
    tables: dict[str, Any] = {
        "run": {"name": "seeds", "rounds": rounds},
        "training": {"kind": "zeroth-order"},
        "space": {"kind": "seed-scalars", "num_seeds": SEEDS, "mode": mode},
    }
    if strategy:
        tables["federation"] = {"strategy": strategy}
    run = build_run(tables, source="test")
    base = tiny_base("llama")
    base.get_parameter("model.norm.weight").requires_grad_(True)
    space = build_space(run, base)
    recorder, grid = Recorder(), LocalGrid(4, InlineWorkers(), f"{APPS}:{app}")
    federation = RoundContext(
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
    state = space.initial_state({})
    if start is not None:
        state = space.apply(state, {"amounts": np.array(start, dtype=np.float64)})
    run_rounds(federation, initial_checkpoint(federation, state))
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


NEARLY_FULL = [2**29, -(2**29), 2**29, -(2**29) + 300, 0, 0]  # sum of magnitudes: 2^31 - 300


def test_scalars_without_room_are_refused_alone_and_the_round_goes_on() -> None:
    recorder = held("greedy", rounds=2, start=NEARLY_FULL)
    assert len(recorder.checkpoints) == 3
    for checkpoint in recorder.checkpoints[1:]:
        outcomes = {outcome.client: outcome for outcome in checkpoint.row.outcomes}
        assert outcomes["client-1"].status == "refused"
        assert outcomes["client-1"].reason.startswith("client-1: scalars that add up to 1000 quanta")
        assert [outcomes[f"client-{n}"].status for n in (0, 2, 3)] == ["folded"] * 3
        assert checkpoint.row.notes == ()
    assert recorder.checkpoints[-1].state["amounts"].tolist() == [
        start + 2 * sent for start, sent in zip(NEARLY_FULL, SENT, strict=True)
    ]


def test_a_change_that_the_server_made_too_large_is_left_out() -> None:
    """A server learning rate of 10 makes 450 quanta of 45, and there is room for 299."""
    recorder = held(
        "honest", rounds=2, start=NEARLY_FULL, kind="fedavgm", server_learning_rate=10.0, server_momentum=0.0
    )
    assert len(recorder.checkpoints) == 3
    for checkpoint in recorder.checkpoints[1:]:
        assert checkpoint.state["amounts"].tolist() == NEARLY_FULL
        assert "left out" in checkpoint.row.notes[0]


def _averaged(changes: list[float], round_: int) -> list[float]:
    return changes


def _with_momentum(changes: list[float], round_: int) -> list[float]:
    """Momentum 0.5 over equal means: 1, 1.5, 1.75 of them; server learning rate 0.7."""
    return [0.7 * change * (2 - 0.5 ** (round_ - 1)) for change in changes]


def _adam(changes: list[float], round_: int) -> list[float]:
    """Reddi et al. 2021, algorithm 2, with Flower's correction; both moments are geometric sums here."""
    first, second = 1 - 0.9**round_, 1 - 0.99**round_
    step = 32 * math.sqrt(1 - 0.99 ** (round_ + 1)) / (1 - 0.9 ** (round_ + 1))
    return [step * first * d / (math.sqrt(second * d * d) + 4.0) for d in changes]


OPTIMISERS: list[tuple[dict[str, Any], Callable[[list[float], int], list[float]]]] = [
    ({"kind": "fedavg"}, _averaged),
    ({"kind": "fedavgm", "server_learning_rate": 0.7, "server_momentum": 0.5}, _with_momentum),
    ({"kind": "fedadam", "eta": 32.0, "tau": 4.0, "beta_1": 0.9, "beta_2": 0.99}, _adam),
]


@pytest.mark.parametrize(("strategy", "rule"), OPTIMISERS)
def test_server_optimisers_move_the_scalars_and_round_once(
    strategy: dict[str, Any], rule: Callable[[list[float], int], list[float]]
) -> None:
    checkpoints = held("varied", rounds=3, **strategy).checkpoints
    means = [sum(column) / 4 for column in zip(*VARIED, strict=True)]
    expected = [0] * SEEDS
    for checkpoint in checkpoints[1:]:
        moves = rule(means, checkpoint.round)
        assert all(abs(abs(move) % 1 - 0.5) > 1e-6 or strategy["kind"] == "fedavg" for move in moves)
        expected = [place + round(move) for place, move in zip(expected, moves, strict=True)]  # ties to even
        assert checkpoint.state["amounts"].dtype == np.int64
        assert checkpoint.state["amounts"].tolist() == expected


def test_a_trimmed_mean_of_common_directions_leaves_out_what_one_client_made_up() -> None:
    checkpoints = held("varied", rounds=2, mode="common", kind="fedtrimmedavg", beta=0.25).checkpoints
    middle = [sorted(column)[1:3] for column in zip(*VARIED, strict=True)]
    expected = [round(sum(two) / 2) for two in middle]
    assert checkpoints[-1].state["amounts"].tolist() == [*expected, *expected]


@pytest.mark.parametrize("mode", ["fedkseed", "fedkseed-pro"])
def test_a_trimmed_mean_needs_common_directions(mode: str, tmp_path: Path) -> None:
    tables = tables_of(tmp_path, mode=mode)
    tables["federation"] = {"strategy": {"kind": "fedtrimmedavg", "beta": 0.3}}
    assert any("set space.mode 'common'" in p for p in problems_of(build_run(tables, source="test")))


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
    resident = load_simulated_run(build_run(tables, source="test"))
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


def _apart(server: RoundServer, last: Checkpoint | None, pool: Workers) -> Checkpoint:
    """Clients that are sent nothing but messages, and remember what they hold."""
    return execute_rounds(server, LocalGrid(server.resident.clients_here, pool), last)


@pytest.mark.parametrize("kind", ["seed-scalars", "projected"])
def test_clients_that_catch_up_in_steps_give_the_bytes_of_those_that_share_a_state(
    kind: str, tmp_path: Path
) -> None:
    """Two of three are asked each round, so that each misses some."""
    tables = tables_of(tmp_path)
    tables["run"]["rounds"] = 6
    tables["federation"] = {"sampling": {"kind": "fixed", "cohort": 2}}
    tables["space"] = {"kind": kind, "num_seeds": 600 if kind == "seed-scalars" else 300}
    if kind == "projected":
        tables["training"]["kind"] = "first-order"
    simulated(tables, tmp_path / "shared")
    run = build_run(tables, source="test")
    with RunFolder.create(tmp_path / "apart", run) as folder, make_progress("quiet") as progress:
        execute_run(folder, Deployment("apart", _apart), progress)
    assert fingerprint(tmp_path / "shared") == fingerprint(tmp_path / "apart")
    with RunFolder.resume(tmp_path / "apart") as folder:
        rounds = [row for row in folder.rows() if isinstance(row, Round)]
    sizes = [[outcome.bytes_down for outcome in row.outcomes] for row in rounds[1:]]
    if kind == "projected":  # whole states grow with the rounds, steps don't
        whole = len(encode(Envelope(last(tmp_path / "apart").state, "", 7, "", kind)))
        assert min(sizes[-1]) < whole / 2


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
    assert "other files than an export" in replayed()[1]
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
    state = load_simulated_run(run).space.initial_state({})
    other = load_simulated_run(run.model_copy(update={"run": run.run.model_copy(update={"name": "other"})}))
    altered = dict(state, fingerprint=np.array(state["fingerprint"])[::-1])
    with pytest.raises(ModelError, match="nothing was trained"):
        other.train_client(0, 1, altered, proximal_mu=0.0)
