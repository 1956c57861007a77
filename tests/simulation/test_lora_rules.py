"""Rules for LoRA's factors, over clients with parts and bases of their own, from first round to file."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedpeft.aggregation.lora_rules import LORA_RULES
from fedpeft.config.client_groups import own_base_of
from fedpeft.config.run_file import build_run, run_digest
from fedpeft.config.sections import RunConfig
from fedpeft.errors import FederationError, RunFileError
from fedpeft.flower.local_grid import LocalGrid
from fedpeft.flower.server_app import check_base
from fedpeft.ledger import RunFolder
from fedpeft.ledger.checkpoint import read_checkpoint
from fedpeft.ledger.records import Round, parse_row
from fedpeft.models.base_model import load_base
from fedpeft.models.export import load_adapter
from fedpeft.participant.load_device import Own, load_own_resident
from fedpeft.participant.load_server import load_serving_run
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.participant.loaded_run import LoadedRun, set_loaded_run
from fedpeft.planning.preflight import problems_of
from fedpeft.transport.roster import roll_call
from fedpeft.transport.tasks import Task
from fedpeft.updates.update import Arrays
from fedpeft.workers import InlineWorkers
from tests.simulation.runs import fingerprint, resumed, simulated

RANK, ALPHA = 4, 8
MIXED = [
    {"clients": ["client-0"], "model": {"quantization": "nf4"}, "peft": {"r": 2}},
    {"clients": ["client-1"], "peft": {"r": 1, "lora_alpha": 8}, "trains": ["layers.2", "layers.3"]},
]
ALIKE = [
    {"clients": ["client-0"], "model": {"quantization": "nf4"}},
    {"clients": ["client-1"], "trains": ["layers.2", "layers.3"]},
]
RANKED = ("hetlora", "flexlora", "flora", "exact-residual")

SAMPLED = ("exact-residual", "fedsa", "rolora")  # one that composes, one that remembers, one that alternates


def tables_of(folder: Path, rule: str, *, rounds: int = 2, groups: bool = True) -> dict[str, Any]:
    rows = [{"prompt": f"say {i}\n", "answer": str(i)} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixed = MIXED if rule in RANKED else ALIKE
    return {
        "run": {"name": "parts", "rounds": rounds},
        "peft": {"method": "ffa-lora" if rule == "ffa" else "lora", "r": RANK, "lora_alpha": ALPHA},
        "data": {
            "train": str(folder / "rows.jsonl"),
            "prompt": "{prompt}",
            "answer": "{answer}",
            "partitioner": {"kind": "iid", "clients": 3},
        },
        "training": {"steps": 1, "batch_size": 4, "lr": 5e-3, "optimizer": "sgd"},
        "federation": {"lora_rule": rule},
        "groups": mixed if groups else [],
        "evaluation": {"bootstrap": 2, "metrics": ["loss"], "every": 9},
    }


def rounds_of(out: Path) -> list[Round]:
    rows = [parse_row(line) for line in (out / "metrics.jsonl").read_bytes().splitlines()]
    return [row for row in rows if isinstance(row, Round) and row.round]


def state_after(out: Path, run: RunConfig, number: int) -> Arrays:
    path = out / "checkpoints" / f"round-{number:06d}.safetensors"
    return read_checkpoint(path, run_digest(run)).state


def change_of(state: Arrays, module: str, scaling: float) -> NDArray[np.float64]:
    """The weight's change that a state's adapter makes, as a whole matrix."""
    a, b = (state[f"{module}.lora_{which}.default.weight"].astype(np.float64) for which in "AB")
    out = scaling * b @ a
    if f"{module}.residual_A" in state:
        out += state[f"{module}.residual_B"].astype(np.float64) @ state[f"{module}.residual_A"]
    return np.asarray(out)


def modules_of(state: Arrays) -> list[str]:
    return sorted(name.partition(".lora_A")[0] for name in state if ".lora_A." in name)


def mean_of_clients(resident: LoadedRun, state: Arrays, number: int, module: str) -> NDArray[np.float64]:
    """What the clients that train a module make of its weight's change, by training them once more."""
    total, weights = np.zeros(()), 0
    for index, client in enumerate(resident.data.clients):
        own = resident.of_client(client.name)
        update, _ = own.train_client(index, number, own.shares.view(client.name, state), proximal_mu=0.0)
        if f"{module}.lora_A.default.weight" not in update.arrays:
            continue
        held = own.shares.view(client.name, state)
        moved = {
            n: held[n].astype(np.float64) + update.arrays.get(n, 0.0) for n in held if n.startswith(module)
        }
        rank = held[f"{module}.lora_A.default.weight"].shape[0]
        alpha = own.run.of_client(client.name).peft.options["lora_alpha"]
        total = total + update.weight * change_of(moved, module, alpha / rank)
        weights += update.weight
    return total / weights


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["flora", "exact-residual"])
def test_the_next_adapter_is_the_mean_of_what_clients_of_all_kinds_compute(rule: str, tmp_path: Path) -> None:
    """Against whole matrices, in a round that begins with a frozen part; and so does the file."""
    tables = tables_of(tmp_path, rule)
    simulated(tables, tmp_path / "run")
    run = build_run(tables, source="test")
    resident = load_simulated_run(run)
    before, after = (state_after(tmp_path / "run", run, number) for number in (1, 2))
    modules = modules_of(before)
    assert f"{modules[0]}.residual_A" in before
    for module in (
        modules[0],
        modules[-1],
    ):  # of a layer that one client doesn't train, and of one that all do
        wanted = mean_of_clients(resident, before, 2, module)
        assert np.abs(wanted).max() > 1e-5
        assert np.abs(change_of(after, module, ALPHA / RANK) - wanted).max() < 1e-6 * np.abs(wanted).max()
    for row in rounds_of(tmp_path / "run"):
        assert row.aggregation is not None
        assert row.aggregation.error < 1e-6
        assert row.aggregation.residual_rank > 0
    resident.space.enter(resident.parameters, after)
    check_exported(resident, after, tmp_path / "run" / "adapter")


def check_exported(resident: LoadedRun, state: Arrays, folder: Path) -> None:
    """One adapter of a higher rank on a plain base computes what the run's model does."""
    run = resident.run
    exported: Any = load_adapter(load_base(run.model), folder)
    tokens = torch.arange(3, 43).reshape(2, 20)
    with torch.no_grad():
        wanted, found = resident.model(tokens).logits, exported(tokens).logits
        start = load_base(run.model)(tokens).logits
    assert torch.allclose(wanted, found, atol=1e-4)  # of about 10: products are added in another order
    assert (wanted - start).abs().max() > 1e-2
    for module in modules_of(state):
        layer = exported.get_submodule(module)
        a, b = (factor["default"].weight.double() for factor in (layer.lora_A, layer.lora_B))
        change = change_of(state, module, ALPHA / RANK)
        moved = (layer.scaling["default"] * b @ a).detach().numpy()
        assert np.abs(moved - change).max() < 1e-6 * np.abs(change).max()
    assert min(exported.peft_config["default"].rank_pattern.values()) > RANK


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        rule if rule in SAMPLED else pytest.param(rule, marks=pytest.mark.exhaustive)
        for rule in sorted(LORA_RULES)
    ],
)
def test_parts_and_bases_of_all_kinds_give_the_same_bytes_however_they_are_run(
    rule: str, tmp_path: Path
) -> None:
    tables = tables_of(tmp_path, rule)
    assert problems_of(build_run(tables, source="test")) == []
    simulated(tables, tmp_path / "one")
    simulated(tables, tmp_path / "two", workers=2)
    assert fingerprint(tmp_path / "two") == fingerprint(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "cut")
    (tmp_path / "cut" / "checkpoints" / "round-000002.safetensors").unlink()
    rows = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "metrics.jsonl").write_text("".join(row for row in rows if '"finished"' not in row))
    resumed(tmp_path / "cut")
    assert fingerprint(tmp_path / "cut") == fingerprint(tmp_path / "one")
    done = rounds_of(tmp_path / "one")
    assert {outcome.status for row in done for outcome in row.outcomes} == {"folded"}
    errors = [row.aggregation.error for row in done if row.aggregation is not None]
    exact = {"ffa": 1e-12, "rolora": 1e-12, "flora": 1e-6, "exact-residual": 1e-6}
    if rule == "fedsa":
        assert errors == []
    elif rule in exact:
        assert max(errors) < exact[rule]
    else:
        assert 1e-6 < max(errors) < 1.0


def test_rolora_moves_one_factor_a_round_and_sends_no_more(tmp_path: Path) -> None:
    tables = tables_of(tmp_path, "rolora", groups=False)
    simulated(tables, tmp_path / "run")
    run = build_run(tables, source="test")
    states = [state_after(tmp_path / "run", run, number) for number in (0, 1, 2)]
    moved = [
        {name.split(".")[-3] for name in before if np.any(before[name] != after[name])}
        for before, after in itertools.pairwise(states)
    ]
    assert moved == [{"lora_B"}, {"lora_A"}]
    sent = [row.outcomes[0].bytes_up for row in rounds_of(tmp_path / "run")]
    whole = rounds_of(tmp_path / "run")[0].outcomes[0].bytes_down
    assert max(sent) < 0.6 * whole


@pytest.mark.slow
def test_what_rests_is_not_moved_by_the_noise_either(tmp_path: Path) -> None:
    tables = tables_of(tmp_path, "rolora", rounds=1, groups=False)
    tables["federation"] |= {"sampling": {"kind": "poisson", "rate": 0.9}, "weighting": "uniform"}
    tables["privacy"] = {
        "kind": "client-level",
        "clip_norm": 1.0,
        "noise_multiplier": 0.5,
        "target_delta": 1e-3,
        "max_epsilon": 1000.0,
        "seeded": True,
    }
    tables["data"]["train"] = "embedded"
    tables["data"] |= {"limit": 12, "prompt": None, "answer": None}
    simulated(tables, tmp_path / "run")
    run = build_run(tables, source="test")
    before, after = (state_after(tmp_path / "run", run, number) for number in (0, 1))
    moved = {name.split(".")[-3] for name in before if np.any(before[name] != after[name])}
    assert moved == {"lora_B"}
    assert [row.aggregation for row in rounds_of(tmp_path / "run")] == [
        None
    ]  # it would tell of single updates


def test_fedsa_keeps_b_with_its_client_and_scores_everybodys_own_model(tmp_path: Path) -> None:
    tables = tables_of(tmp_path, "fedsa", groups=False)
    tables["evaluation"]["every"] = 1
    simulated(tables, tmp_path / "run")
    run = build_run(tables, source="test")
    last = read_checkpoint(tmp_path / "run" / "checkpoints" / "round-000002.safetensors", run_digest(run))
    assert not any(array.any() for name, array in last.state.items() if ".lora_B." in name)
    kept = {name for name in last.clients if ".lora_B." in name}
    assert {name.partition("/")[0] for name in kept} == {"1", "2", "3"}
    assert all(last.clients[name].any() for name in kept)
    resident = load_simulated_run(run)
    evaluation = rounds_of(tmp_path / "run")[-1].evaluation
    assert evaluation is not None
    scored = {client.name for client in resident.data.clients if len(client.heldout)}
    assert evaluation.clients["loss"].keys() == scored != set()
    for index, client in enumerate(resident.data.clients):
        own = {
            name.partition("kept/")[2]: array
            for name, array in last.clients.items()
            if name.startswith(f"{index + 1}/kept/")
        }
        assert set(own) == {name for name in last.state if ".lora_B." in name}
        if client.name not in scored:
            continue
        loss = resident.compute_held_out_loss(
            index, {**last.state, **own}, {}, {f"kept/{n}": a for n, a in own.items()}
        )
        assert evaluation.clients["loss"][client.name] == pytest.approx(loss, rel=1e-6)


def test_only_those_who_train_a_parameter_are_in_its_mean(tmp_path: Path) -> None:
    """Without a rule as well, and with two of three clients sparing the first layers."""
    tables = tables_of(tmp_path, "fedit", rounds=1)
    del tables["federation"]
    tables["groups"] = [{"clients": ["client-0", "client-2"], "trains": ["layers.3"]}]
    simulated(tables, tmp_path / "run")
    run = build_run(tables, source="test")
    resident = load_simulated_run(run)
    before, after = (state_after(tmp_path / "run", run, number) for number in (0, 1))
    updates = [resident.train_client(i, 1, before, proximal_mu=0.0)[0] for i in range(3)]
    for name in before:
        holders = [update for update in updates if name in update.arrays]
        assert len(holders) == (3 if ".layers.3." in name else 1)
        weight = sum(update.weight for update in holders)
        mean = sum(update.weight * update.arrays[name].astype(np.float64) for update in holders) / weight
        assert np.allclose(after[name], before[name] + mean, atol=1e-7)
    row = rounds_of(tmp_path / "run")[0]
    assert row.aggregation is None
    sizes = {outcome.client: outcome.bytes_up for outcome in row.outcomes}
    assert sizes["client-0"] < 0.5 * sizes["client-1"]


def test_groups_that_name_no_module_are_refused_as_they_are_loaded(tmp_path: Path) -> None:
    tables = tables_of(tmp_path, "fedit")
    tables["groups"] = [{"clients": ["client-0"], "trains": ["layers.9"]}]
    with pytest.raises(RunFileError, match=r"groups\.0\.trains: 'layers\.9' names no module"):
        simulated(tables, tmp_path / "run")


@pytest.mark.slow
def test_clients_of_a_group_agree_on_its_base_and_a_device_loads_that_alone(tmp_path: Path) -> None:
    tables = tables_of(tmp_path, "flora")
    run = build_run(tables, source="test")
    resident = load_simulated_run(run)
    set_loaded_run(resident)
    grid, task = LocalGrid(3, InlineWorkers()), Task(resident.run_digest, 0, b"")
    roster = roll_call(grid, task, expected=3, own_base=own_base_of(run))
    check_base(roster, resident)
    held = [roster.base_of(name) for name in roster.names]
    assert held == [resident.of_client(name).base_digest for name in roster.names]
    assert held[0] != held[1]  # NF4
    assert held[1] == held[2]  # another rank, the same base
    assert not roster.one_base
    with pytest.raises(FederationError, match=r"base models differ within groups\.0: 1 of 2"):
        roll_call(grid, task, expected=3, own_base=lambda name: 0 if name != "client-2" else None)
    with pytest.raises(FederationError, match="base models differ: 1 of 3"):
        roll_call(grid, task, expected=3)
    fewer = roll_call(grid, task, expected=2)  # one with another base does not keep the others
    assert fewer.names == ["client-1", "client-2"]
    assert fewer.base_digest == held[1]

    device = load_own_resident(run, Own("client-0", tmp_path / "rows.jsonl"))
    assert device.of_client("client-0") is device
    assert device.base_digest == held[0]
    assert {p.shape[0] for name, p in device.parameters.items() if ".lora_A." in name} == {2}
    server = load_serving_run(run)
    check_base(roster, server)  # of groups that it doesn't load, agreement among themselves is enough
    assert [server.loads(name) for name in roster.names] == [False, False, True]


def test_a_run_folder_keeps_what_a_rule_needs(tmp_path: Path) -> None:
    tables = tables_of(tmp_path, "exact-residual", rounds=1, groups=False)
    tables["federation"]["residual_rank"] = 3
    tables["training"]["steps"] = 2  # in the first, B moves alone
    simulated(tables, tmp_path / "run")
    (row,) = rounds_of(tmp_path / "run")
    assert row.aggregation is not None
    assert row.aggregation.residual_rank == 3
    assert 1e-6 < row.aggregation.error < 1.0  # what the cap leaves out is said
    with RunFolder.resume(tmp_path / "run") as folder:
        assert folder.read_end() is not None
    assert "Aggregation error of exact-residual" in (tmp_path / "run" / "report.html").read_text()
