"""Hostile clients of a simulation, against honest ones of the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fedpeft.config.run_file import build_run
from fedpeft.errors import RunFileError
from fedpeft.ledger.records import Round, Started, parse_row
from fedpeft.participant.load_device import Own, load_own_resident
from fedpeft.participant.load_server import load_serving_run
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.participant.loaded_run import LoadedRun
from fedpeft.planning.plan import make_plan
from tests.simulation.runs import fingerprint, simulated

LABELS = ("no", "perhaps", "yes")


@pytest.fixture
def tables(tmp_path: Path, tiny_bert: str) -> dict[str, Any]:
    """A classifier of three classes with five clients."""
    rows = [{"text": f"row {i}", "label": LABELS[i % 3]} for i in range(45)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "run": {"name": "attacked", "rounds": 2},
        "model": {"path": tiny_bert, "task": "sequence-classification"},
        "peft": {"method": "lora", "r": 2},
        "data": {
            "train": str(tmp_path / "rows.jsonl"),
            "text": "{text}",
            "label": "label",
            "labels": list(LABELS),
            "partitioner": {"kind": "iid", "clients": 5},
        },
        "training": {"steps": 2, "batch_size": 4, "lr": 1e-2},
        "evaluation": {"bootstrap": 2, "metrics": ["accuracy"], "every": 9},
    }


def attacked(tables: dict[str, Any], **attack: Any) -> dict[str, Any]:
    return {**tables, "federation": {"weighting": "uniform", "attack": attack}}


def sent(resident: LoadedRun) -> dict[str, dict[str, NDArray[np.float64]]]:
    """What every client sends in round 1, by name."""
    start = resident.space.initial_state(resident.parameters)
    state = {name: np.array(array) for name, array in start.items()}
    found = {}
    for index, client in enumerate(resident.data.clients):
        update, _ = resident.train_client(index, 1, state, proximal_mu=0.0)
        found[client.name] = {name: array.astype(np.float64) for name, array in update.arrays.items()}
    return found


def test_attackers_send_what_they_do_and_the_others_what_they_learned(tables: dict[str, Any]) -> None:
    honest = sent(load_simulated_run(build_run(tables, source="test")))
    names = sorted(honest)
    two = [names[1], names[3]]
    flipped = sent(
        load_simulated_run(build_run(attacked(tables, kind="sign-flip", clients=two), source="test"))
    )
    little = sent(
        load_simulated_run(build_run(attacked(tables, kind="alie", z=2.0, clients=two), source="test"))
    )
    for name in names:
        for key, array in honest[name].items():
            known = np.stack([honest[colluder][key] for colluder in two])
            crowd = known.mean(axis=0) - 2.0 * known.std(axis=0)
            np.testing.assert_array_equal(flipped[name][key], -array if name in two else array)
            np.testing.assert_allclose(
                little[name][key], crowd if name in two else array, rtol=1e-5, atol=1e-8
            )


def test_flipped_labels_are_trained_on_by_attackers_and_scored_by_nobody(tables: dict[str, Any]) -> None:
    """As if the attacker's own rows said so: the same rows, named the other way round, in an honest run."""
    tables["data"]["heldout"] = 0.0  # rows are held out by what they say, their class included
    resident = load_simulated_run(
        build_run(attacked(tables, kind="label-flip", clients=["client-2"]), source="test")
    )
    came = sent(resident)
    rows = resident.data.rows.labels
    assert rows is not None
    other = {**tables, "data": {**tables["data"], "labels": list(reversed(LABELS))}}
    backwards, straight = (sent(load_simulated_run(build_run(t, source="test"))) for t in (other, tables))
    for key, array in came["client-2"].items():
        np.testing.assert_array_equal(array, backwards["client-2"][key])
        np.testing.assert_array_equal(came["client-1"][key], straight["client-1"][key])
    assert any(np.any(came["client-2"][key] != straight["client-2"][key]) for key in came["client-2"])
    plain = load_simulated_run(build_run(tables, source="test")).data.rows.labels
    np.testing.assert_array_equal(rows, plain)  # what evaluation and baselines see


def test_a_run_with_devices_elsewhere_has_no_attackers_of_its_own(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    run = build_run(attacked(tables, kind="noise", fraction=0.4), source="test")
    with pytest.raises(RunFileError, match="in simulations only"):
        load_own_resident(run, Own("client-1", tmp_path / "rows.jsonl"))
    with pytest.raises(RunFileError, match="in simulations only"):
        load_serving_run(run)


def test_unknown_attackers_are_refused_by_run_and_plan(tables: dict[str, Any]) -> None:
    run = build_run(attacked(tables, kind="noise", clients=["nobody"]), source="test")
    with pytest.raises(RunFileError, match="no client 'nobody'"):
        load_simulated_run(run)
    assert any("'nobody'" in problem for problem in make_plan(run).problems)


def test_the_plan_names_the_rule_and_the_attackers(tables: dict[str, Any]) -> None:
    changed = attacked(tables, kind="noise", clients=["client-4", "client-2"])
    changed["federation"]["strategy"] = {"kind": "norm-bound"}
    rule = make_plan(build_run(changed, source="test")).rule
    assert rule is not None
    assert (rule.strategy, rule.geometry, rule.attack) == ("norm-bound", "product", "noise")
    assert rule.attackers == ("client-2", "client-4")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["alie", "noise"])
def test_the_number_of_workers_changes_nothing(kind: str, tables: dict[str, Any], tmp_path: Path) -> None:
    tables = attacked(tables, kind=kind, fraction=0.4)
    tables["federation"]["strategy"] = {
        "kind": "multikrum",
        "num_malicious_nodes": 1,
        "num_nodes_to_select": 3,
    }
    simulated(tables, tmp_path / "1")
    simulated(tables, tmp_path / "2", workers=2)
    assert fingerprint(tmp_path / "1") == fingerprint(tmp_path / "2")
    rows = [parse_row(line) for line in (tmp_path / "1" / "metrics.jsonl").read_bytes().splitlines()]
    started = next(row for row in rows if isinstance(row, Started))
    assert (started.attack, len(started.attackers)) == (kind, 2)
    assert all(
        outcome.status == "folded" for row in rows if isinstance(row, Round) for outcome in row.outcomes
    )
    report = (tmp_path / "1" / "report.html").read_text()
    assert f"{kind} by 2 clients: {', '.join(started.attackers)}" in report
    assert "multikrum (num_malicious_nodes 1, num_nodes_to_select 3)" in report
