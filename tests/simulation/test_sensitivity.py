"""What `fedpeft audit sensitivity` measures and says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.commands.audit import report_sensitivity, sensitivity_command
from fedpeft.config.run_file import build_run
from fedpeft.config.sections import RunConfig
from fedpeft.data.row_records import RowRecord
from fedpeft.data.run_tables import source_records
from fedpeft.errors import DataError, PrivacyError, RunFileError, UsageError
from fedpeft.simulation.sensitivity import Measurement, draw_records, measure_sensitivity

PRIVACY = {
    "kind": "record-level",
    "max_grad_norm": 0.5,
    "noise_multiplier": 1.0,
    "sample_rate": 0.5,
    "expected_batch_size": 4,
    "target_delta": 1e-5,
    "max_epsilon": 1e6,
}
ZEROTH = {"kind": "zeroth-order", "steps": 1, "queries": 3}
ORDERS: dict[str, dict[str, Any]] = {
    "first": {"training": {"steps": 1}, "peft": {"method": "lora", "r": 2, "lora_dropout": 0.1}},
    "zeroth": {"training": ZEROTH},
    "seeds": {"training": ZEROTH, "space": {"kind": "seed-scalars", "num_seeds": 16}},
}


def private_run(**tables: Any) -> RunConfig:
    made: dict[str, Any] = {
        "run": {"name": "p", "rounds": 2},
        "data": {"max_length": 24, "partitioner": {"kind": "iid", "clients": 2}},
        "federation": {"weighting": "uniform"},
        "peft": {"method": "lora", "r": 2},
        "privacy": PRIVACY,
    }
    return build_run(made | tables, source="test")


def persons_file(folder: Path) -> Path:
    """Six persons, up to three records each, up to two rows each."""
    rows = [
        {"q": f"{n} and {n * n} ", "turns": [f"{n + 1}", f"{n + 2}"][: 1 + n % 2], "who": f"w{n % 6}"}
        for n in range(14)
    ]
    path = folder / "site.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("order", sorted(ORDERS))
def test_a_record_moves_a_step_by_at_most_the_bound(order: str) -> None:
    run = private_run(**ORDERS[order])
    records = draw_records(source_records(run.data, run.run.seed), 8, np.random.default_rng(0))
    found = list(measure_sensitivity(run, records, neighbours=3))
    assert [each.round for each in found] == [0, 1, 2]
    assert all(each.records == 1 and not each.exceeds for each in found)
    assert 0.1 < max(each.measured for each in found) <= found[0].bound < 1.0 + 1e-6
    assert found == list(measure_sensitivity(run, records, neighbours=3))


def test_a_person_with_all_its_rows_moves_a_step_by_at_most_the_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command, on a file of one's own."""
    run_file = tmp_path / "run.toml"
    run_file.write_text("[run]\nname = 'p'\nrounds = 2\n[training]\nsteps = 1\n[peft]\nmethod = 'lora'\n")
    data = {"prompt": "{q}", "answer": "{turns}", "explode": "turns", "user": "who", "train": "nowhere"}
    tables: dict[str, dict[str, Any]] = {
        "privacy": PRIVACY,
        "federation": {"weighting": "uniform"},
        "data": data,
    }
    items = [
        f"{table}.{key}={json.dumps(value)}" for table, keys in tables.items() for key, value in keys.items()
    ]
    options: dict[str, Any] = {"data": persons_file(tmp_path), "rows": 99, "neighbours": 3, "seed": 1}
    sensitivity_command(run_file, items, **options, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["unit"], told["records"], told["exceeded"]) == ("person", 14, 0)
    assert {each["records"] for each in told["measurements"]} <= {2, 3}
    assert max(each["measured"] for each in told["measurements"]) > 0.1
    sensitivity_command(run_file, items, **options, as_json=False)
    shown = capsys.readouterr().out
    assert shown.count("within") == 3
    assert "no person moves the sum further than its noise is made for" in shown


def test_beyond_the_bound_it_ends_with_10(capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        Measurement("t.jsonl: row 3", 1, 0, measured=0.9, bound=1.0),
        Measurement("t.jsonl: row 7", 1, 1, measured=7.6, bound=1.0),
        Measurement("t.jsonl: row 9", 1, 2, measured=float("nan"), bound=1.0),
    ]
    for as_json in (False, True):
        with pytest.raises(SystemExit) as ended:
            report_sensitivity(private_run(**ORDERS["first"]), 9, found, as_json=as_json)
        assert ended.value.code == 10
        out = capsys.readouterr().out
        assert json.loads(out)["exceeded"] == 2 if as_json else out.count("EXCEEDED") == 2


def test_where_nothing_was_measured_no_bound_is_said_to_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that are all held out move nothing, whatever the training does with rows."""
    run_file = tmp_path / "run.toml"
    run_file.write_text("[run]\nname = 'p'\nrounds = 2\n[training]\nsteps = 1\n[peft]\nmethod = 'lora'\n")
    items = ["federation.weighting='uniform'", "data.heldout=0.999", "data.max_length=24"]
    items += [f"privacy.{key}={json.dumps(value)}" for key, value in PRIVACY.items()]
    options: dict[str, Any] = {"data": None, "rows": 6, "neighbours": 2, "seed": 0, "as_json": True}
    with pytest.raises(DataError, match="none of the 2 records that were left out moved the sum"):
        sensitivity_command(run_file, items, **options)
    assert not capsys.readouterr().out


def test_other_privacy_and_unsound_runs_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": None, "rows": 4, "neighbours": 1, "seed": 0, "as_json": True}
    with pytest.raises(UsageError, match="record-level"):
        sensitivity_command(None, [], **options)
    items = ["training.steps=1", "federation.weighting='uniform'", "training.fused_update=true"]
    items += [f"privacy.{key}={json.dumps(value)}" for key, value in PRIVACY.items()]
    with pytest.raises(RunFileError, match="fused_update"):
        sensitivity_command(None, items, **options)
    with pytest.raises(PrivacyError, match="record-level"):
        list(measure_sensitivity(private_run(privacy=None), [], neighbours=1))


def test_any_records_of_a_stream_are_drawn_alike() -> None:
    records = [RowRecord(0, "s", number, {}) for number in range(20)]
    counts = np.zeros(20)
    for seed in range(2000):
        drawn = [record.number for record in draw_records(records, 5, np.random.default_rng(seed))]
        assert len(drawn) == 5
        assert drawn == sorted(drawn)
        counts[drawn] += 1
    assert np.all(np.abs(counts - 500) < 6 * np.sqrt(500 * 0.75))  # false alarm: one in ten million
    assert draw_records(records[:3], 5, np.random.default_rng(0)) == records[:3]
