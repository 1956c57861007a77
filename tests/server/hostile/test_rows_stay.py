"""A server that asks for rows through errors: what it is told is a code, and the same for every device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedpeft.config.device_task import device_task
from fedpeft.config.run_file import build_run
from fedpeft.errors import DataError, FedPEFTError, PolicyError
from fedpeft.participant.loaded_run import drop_loaded_run
from fedpeft.transport.tasks import HELLO, Hello, Task, read_hello, task_content
from fedpeft_client.policy.owner_policy import Policy
from fedpeft_server.transport.grpc_grid import RunIdentity, node_id
from tests.server.fleet import agents_with_rows, server, wait_for

ROWS = [
    {"note": "flu", "ssn": "100-10-1000", "grade": "a", "visits": ["x"]},
    {"note": "cold", "ssn": "200-20-2000", "grade": "b", "visits": None},
]
SECRETS = ("100-10-1000", "200-20-2000", "ssn", "grade", "visits", "note", "flu", "cold", "patients")
CLASSIFIER = {"model": {"task": "sequence-classification"}}
PLAIN = {"text": "{note}"}

# What a run file can ask to have a row told in an error's text.
PROBES: dict[str, dict[str, Any]] = {
    "foreign label column": {
        **CLASSIFIER,
        "data": {"text": "{note}", "label": "ssn", "labels": ["nobody", "else"]},
    },
    "foreign label column of one row": {
        **CLASSIFIER,
        "data": {"text": "{note}", "label": "ssn", "labels": ["0", "1"], "filter": {"grade": "b"}},
    },
    "names of fields": {"data": {"text": "{no-such-field}"}},
    "names of fields by a filter": {"data": {**PLAIN, "filter": {"no-such-field": 1}}},
    "membership": {"data": {**PLAIN, "filter": {"ssn": "300-30-3000"}}},
    "a list's content": {"data": {**PLAIN, "explode": "ssn"}},
    "a list in a template": {"data": {"text": "{visits}"}},
}


def ask(
    home: Path, rows: str, run_tables: Mapping[str, Any], **policy: Any
) -> tuple[Hello | FedPEFTError, str]:
    """What a server gets for a roll call, and what the owner's status says."""
    data = home / "patients.jsonl"
    home.mkdir()
    data.write_text(rows)
    run = build_run({"run": {"name": "probe", "rounds": 1}, **run_tables}, source="test")
    task = device_task(run)
    digest = task.digest
    try:
        owners = Policy.model_validate({"allow_filters": True, **policy})
        with (
            server() as running,
            agents_with_rows(running.address, {"site-a": data}, home, policy=owners),
        ):
            grid = running.grid(RunIdentity("probe-1", digest))
            wait_for(lambda: grid.agents_here)
            grid.know(["site-a"])
            content = task_content(Task(digest, 0, b"", device_task=task.text))
            (reply,) = grid.send_and_receive([Message(content, node_id("site-a"), HELLO, group_id="0")])
            told: Hello | FedPEFTError
            try:
                told = read_hello(reply)
            except FedPEFTError as error:
                told = error
    finally:
        drop_loaded_run(digest)
    return told, str(json.loads((home / "site-a" / "status.json").read_text()))


@pytest.mark.parametrize("probe", sorted(PROBES))
def test_no_row_leaves_in_an_error(probe: str, tmp_path: Path) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    error, status = ask(tmp_path / "home", rows, PROBES[probe])
    told = str(error)
    assert isinstance(error, DataError)
    assert not [secret for secret in (*SECRETS, str(tmp_path)) if secret in told]
    assert "DataError: " in status, "the owner is told what is wrong"
    assert "'data'" not in status


def test_rows_that_are_broken_in_any_way_look_alike(tmp_path: Path) -> None:
    broken = ["{", "[1]", json.dumps({"note": None}), json.dumps({"x": "y"}), json.dumps({"note": [1]})]
    tables = {"data": PLAIN}
    told = {str(ask(tmp_path / str(at), row + "\n", tables)[0]) for at, row in enumerate(broken)}
    assert len(told) == 1


MANY = "".join(
    json.dumps({"note": f"n{at} and more", "ward": "w" if at < 3 else "v"}) + "\n" for at in range(9)
)
FILTERED = {"data": {**PLAIN, "heldout": 0.0, "filter": {"ward": "w"}}}


def test_a_filter_is_refused_unless_the_owner_permits_it(tmp_path: Path) -> None:
    told, _ = ask(tmp_path / "home", MANY, FILTERED, allow_filters=False)
    assert isinstance(told, PolicyError)
    assert str(told).endswith("refused by the agent's policy: policy.allow_filters")


def test_few_rows_no_rows_and_broken_rows_look_alike(tmp_path: Path) -> None:
    """At `min_rows` = 4 a filter that finds three rows, or none, says no more than rows that are no JSON."""
    none = {"data": {**PLAIN, "filter": {"ward": "x"}}}
    told = {
        str(ask(tmp_path / "few", MANY, FILTERED, min_rows=4)[0]),
        str(ask(tmp_path / "none", MANY, none, min_rows=4)[0]),
        str(ask(tmp_path / "broken", "{", {"data": PLAIN}, min_rows=4)[0]),
    }
    assert len(told) == 1
    assert "('data')" in told.pop()


@pytest.mark.slow
def test_small_counts_are_withheld(tmp_path: Path) -> None:
    uniform = {**FILTERED, "federation": {"weighting": "uniform"}}
    told, _ = ask(tmp_path / "told", MANY, uniform, min_count=3)
    withheld, _ = ask(tmp_path / "withheld", MANY, uniform, min_count=4)
    refused, _ = ask(tmp_path / "refused", MANY, FILTERED, min_count=4)
    assert isinstance(told, Hello)
    assert told.examples == 3
    assert isinstance(withheld, Hello)
    assert withheld.examples == 0
    assert isinstance(refused, PolicyError)
    assert str(refused).endswith("refused by the agent's policy: policy.min_count")
