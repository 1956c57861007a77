"""Clients of one round that train in different ways, over the same parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.config.run_file import build_run, run_digest, run_from_json, run_json, run_toml
from fedpeft.errors import RunFileError
from fedpeft.ledger import RunFolder
from fedpeft.ledger.records import Round
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.planning.plan import make_plan
from fedpeft.planning.preflight import problems_of
from tests.simulation.runs import fingerprint, simulated

ZEROTH = {"kind": "zeroth-order", "lr": 1e-3, "steps": 3, "batch_size": 2}


def tables_of(folder: Path, *groups: dict[str, Any]) -> dict[str, Any]:
    rows = [{"prompt": f"say {i}\n", "answer": str(i)} for i in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "run": {"name": "mixed", "rounds": 2},
        "peft": {"method": "lora", "r": 2},
        "data": {
            "train": str(folder / "rows.jsonl"),
            "prompt": "{prompt}",
            "answer": "{answer}",
            "partitioner": {"kind": "iid", "clients": 3},
        },
        "training": {"steps": 2, "batch_size": 4, "lr": 1e-3, "optimizer": "sgd", "weight_decay": 0.01},
        "groups": list(groups),
        "evaluation": {"bootstrap": 2, "metrics": ["loss"], "every": 9},
    }


def names_of(folder: Path) -> list[str]:
    data = load_simulated_run(build_run(tables_of(folder), source="test")).data
    return [client.name for client in data.clients]


def test_first_and_zeroth_order_clients_serve_in_one_round(tmp_path: Path) -> None:
    one, two, three = names_of(tmp_path)
    tables = tables_of(tmp_path, {"clients": [two], "training": ZEROTH})
    simulated(tables, tmp_path / "1")
    simulated(tables, tmp_path / "2", workers=2)
    assert fingerprint(tmp_path / "1") == fingerprint(tmp_path / "2")
    with RunFolder.resume(tmp_path / "1") as folder:
        rounds = [row for row in folder.rows() if isinstance(row, Round)]
    for row in rounds[1:]:
        outcomes = {outcome.client: outcome for outcome in row.outcomes}
        assert [outcomes[name].steps for name in (one, two, three)] == [2, 3, 2]
        assert {outcome.status for outcome in row.outcomes} == {"folded"}


def test_each_client_moves_as_in_a_run_of_its_own_kind(tmp_path: Path) -> None:
    """The same seed, rows and state: only who else takes part differs."""
    one, two, three = names_of(tmp_path)
    mixed = tables_of(tmp_path, {"clients": [two], "training": ZEROTH})
    plain, zeroth = tables_of(tmp_path), {**tables_of(tmp_path), "training": ZEROTH}
    moved = {}
    for name, tables in (("mixed", mixed), ("plain", plain), ("zeroth", zeroth)):
        resident = load_simulated_run(build_run(tables, source="test"))
        state = resident.space.initial_state(resident.parameters)
        moved[name] = [resident.train_client(i, 1, state, proximal_mu=0.0)[0].arrays for i in range(3)]
    for index, same in ((0, "plain"), (1, "zeroth"), (2, "plain")):
        for key, array in moved["mixed"][index].items():
            assert np.array_equal(array, moved[same][index][key])
    assert any(np.any(moved["zeroth"][1][key] != moved["plain"][1][key]) for key in moved["plain"][1])
    assert three != one


def test_a_groups_keys_are_laid_over_the_runs_own() -> None:
    tables = {
        "run": {"name": "x", "rounds": 1},
        "training": {"lr": 0.5, "momentum": 0.9, "optimizer": "sgd"},
        "groups": [
            {"clients": ["a", "b"], "training": {"lr": 0.25}},
            {"clients": ["c"], "training": {"kind": "zeroth-order", "steps": 4}},
        ],
    }
    run = build_run(tables, source="test")
    assert run.of_client("b").training == run.training.model_copy(update={"lr": 0.25})
    other = run.of_client("c").training  # another kind begins from the defaults
    assert (other.kind, other.steps, other.momentum) == ("zeroth-order", 4, 0.0)
    assert run.of_client("d") is run
    assert run_digest(run_from_json(run_json(run))) == run_digest(run)
    assert 'clients = [\n    "c",\n]' in run_toml(run)
    assert run_digest(run) != run_digest(build_run({**tables, "groups": []}, source="test"))


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([{"clients": ["a"]}, {"clients": ["b", "a"]}], "'a' is named twice"),
        ([{"clients": ["a"], "training": {"lrate": 1.0}}], r"groups\.0\.training\.lrate: unknown key"),
        ([{"clients": ["a"], "training": {"lr": -1.0}}], r"groups\.0\.training\.lr: .*greater than 0"),
        ([{"clients": ["a"], "optimizer": "sgd"}], r"groups\.0\.optimizer: unknown key"),
        ([{"clients": []}], r"groups\.0\.clients"),
    ],
)
def test_groups_that_contradict_themselves_are_refused(groups: list[Any], words: str) -> None:
    with pytest.raises(RunFileError, match=words):
        build_run({"run": {"name": "x", "rounds": 1}, "groups": groups}, source="test")


def test_what_is_refused_of_a_run_is_refused_of_a_group() -> None:
    tables = {
        "run": {"name": "x", "rounds": 1},
        "groups": [{"clients": ["a"], "training": {"kind": "zeroth-order", "weight_decay": 0.1}}],
    }
    (problem,) = problems_of(build_run(tables, source="test"))
    assert problem.startswith("groups.0: training.weight_decay:")
    seeds = {**tables, "training": {"kind": "zeroth-order"}, "space": "seed-scalars"}
    seeds["groups"] = [{"clients": ["a"], "training": {"kind": "first-order"}}]
    assert any(p.startswith("groups.0: space:") for p in problems_of(build_run(seeds, source="test")))


def test_unknown_clients_are_refused_by_run_and_plan(tmp_path: Path) -> None:
    tables = tables_of(tmp_path, {"clients": ["nobody"], "training": ZEROTH})
    with pytest.raises(RunFileError, match="there is no client 'nobody'"):
        simulated(tables, tmp_path / "run")
    assert any("'nobody'" in problem for problem in make_plan(build_run(tables, source="test")).problems)


def test_the_plan_counts_each_groups_steps(tmp_path: Path) -> None:
    names = names_of(tmp_path)
    rounds = make_plan(
        build_run(tables_of(tmp_path, {"clients": names[1:], "training": ZEROTH}), source="t")
    ).rounds
    assert rounds is not None
    assert rounds.steps == 2 * (2 + 3 + 3)
    assert rounds.examples == 2 * (2 * 4 + 2 * 3 * 2)
