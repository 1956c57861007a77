"""A server that asks for rows through errors: what it is told is a code, and the same for every device."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from fedpeft.errors import DataError, FedPEFTError
from fedpeft.flower.tasks import HELLO, Task, read_hello, task_content
from fedpeft.resident import drop_resident
from fedpeft.runfile import build_run, run_digest, run_json
from fedpeft_client.workshop import CLIENT_APP
from fedpeft_server.grid import RunIdentity, node_id
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


def ask(home: Path, rows: str, run_tables: Mapping[str, Any]) -> tuple[FedPEFTError, str]:
    """The error that a server gets for a roll call, and what the owner's status says."""
    data = home / "patients.jsonl"
    home.mkdir()
    data.write_text(rows)
    run = build_run({"run": {"name": "probe", "rounds": 1}, **run_tables}, source="test")
    digest = run_digest(run)
    try:
        with server() as running, agents_with_rows(running.address, {"site-a": data}, home, app=CLIENT_APP):
            grid = running.grid(RunIdentity("probe-1", digest))
            wait_for(lambda: grid.connected)
            grid.know(["site-a"])
            content = task_content(Task(digest, 0, b"", run_json(run)))
            (reply,) = grid.send_and_receive([Message(content, node_id("site-a"), HELLO, group_id="0")])
            with pytest.raises(FedPEFTError) as raised:
                read_hello(reply)
    finally:
        drop_resident(digest)
    return raised.value, str(json.loads((home / "site-a" / "status.json").read_text()))


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
