"""What leaves a device is in its owner's ledger: each message, byte, name and number that a socket saw."""

from __future__ import annotations

import ast
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from typer.testing import CliRunner

import fedpeft_client
from fedpeft.cli import app as command_line
from fedpeft.errors import StateError
from fedpeft.transport.record_bytes import content_bytes
from fedpeft.transport.tasks import HELLO, TRAIN, Task, task_content
from fedpeft.updates.update import arrays_digest, freeze_arrays
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.v1 import update_pb2
from fedpeft.wire.codec import Envelope, encode
from fedpeft_client.commands.ledger_lines import ledger_lines
from fedpeft_client.policy.owner_policy import Policy
from fedpeft_client.transport.egress import (
    EGRESS_FILE,
    KEPT_FILES,
    EgressLedger,
    EgressSums,
    contents,
    files_aside,
    read_ledger,
)
from fedpeft_server.transport.grpc_grid import GrpcGrid, node_id
from tests.server.fleet import RUN, fleet, server, wait_for
from tests.server.hostile.apps import BASE
from tests.server.relay import relay

APP = "tests.server.hostile.apps:plain"
START = freeze_arrays({"a": np.zeros((2, 3), dtype=np.float32), "b": np.ones(4000, dtype=np.float32)})


def state(round_: int) -> bytes:
    start = Envelope(START, RUN.digest, round_, arrays_digest(START), "adapter-delta", base_digest=BASE)
    return encode(start)


def ask(grid: GrpcGrid, name: str, kind: str, round_: int, body: bytes) -> Message:
    grid.know([name])
    content = task_content(Task(RUN.digest, round_, body))
    (reply,) = grid.send_and_receive([Message(content, node_id(name), kind, group_id=str(round_))])
    return reply


def sums(entries: list[dict[str, Any]]) -> tuple[int, int]:
    """Messages and bytes of a ledger."""
    return sum(entry.get("messages", 1) for entry in entries), sum(entry["bytes"] for entry in entries)


def of_socket(streams: list[list[bytes]]) -> tuple[dict[str, float], list[str], int]:
    """Metrics by name, codes of failures, and bytes of the blob, read from what a socket saw."""
    metrics: dict[str, float] = {}
    failures, blob = [], b""
    for stream in streams:
        if len(stream) > 1 and len(pb.BlobUpload.FromString(stream[0]).open.digest) == 32:
            blob += b"".join(pb.BlobUpload.FromString(raw).chunk.data for raw in stream[1:])
        elif len(stream) > 1:
            sent = [pb.AgentMessage.FromString(raw).result for raw in stream]
            failures += [pb.FailureCode.Name(r.failure.code) for r in sent if r.HasField("failure")]
    payload = next(entry.data for record in pb.Content.FromString(blob).records for entry in record.entries)
    metrics |= dict(update_pb2.Update.FromString(payload).header.metrics)
    return metrics, failures, len(blob)


def test_the_ledger_is_what_a_socket_saw(tmp_path: Path) -> None:
    with (
        server(max_inline_bytes=4096, chunk_bytes=4096, heartbeat_s=0.2) as running,
        relay(running.address) as seen,
    ):
        with fleet(seen.address, ["ada"], tmp_path, app=APP):
            grid = running.grid(RUN)
            wait_for(lambda: grid.agents_here)
            assert not ask(grid, "ada", HELLO, 0, b"").has_error()
            assert not ask(grid, "ada", TRAIN, 1, state(1)).has_error()
            assert ask(grid, "ada", TRAIN, 2, b"no state").has_error()
            wait_for(lambda: any(b"\x12\x00" in m[:2] for m in seen.messages()))  # a heartbeat
        wait_for(lambda: sums(list(read_ledger(tmp_path / "ada")))[0] == len(seen.messages()))
    entries, messages = list(read_ledger(tmp_path / "ada")), seen.messages()
    assert sums(entries) == (len(messages), sum(map(len, messages)))
    kinds = {entry["what"] for entry in entries}
    assert kinds == {"hello", "received", "result", "heartbeat", "blob", "piece", "pull"}

    metrics, failures, blob = of_socket(seen.streams())
    told = [entry for entry in entries if entry["what"] == "result"]
    assert [entry["metrics"] for entry in told if "metrics" in entry] == [metrics] == [{"loss": 0.5}]
    assert [entry["weight"] for entry in told if "metrics" in entry] == [1]
    assert [entry["failure"] for entry in told if "failure" in entry] == failures == ["FAILURE_CODE_TASK"]
    assert [entry["size"] for entry in entries if entry["what"] == "blob"] == [blob]
    greeting = next(entry for entry in told if entry["kind"] == HELLO)
    assert greeting["values"] == {"hello.base-digest": BASE, "hello.client": "ada", "hello.examples": 10}
    assert [entry["capabilities"] for entry in entries if entry["what"] == "hello"] == [{}]


def test_a_refusal_is_in_the_ledger_with_the_number_that_it_tells(tmp_path: Path) -> None:
    policy = Policy(max_bytes_per_day=100, tell_limits=("max_bytes_per_day",), capabilities=("cores",))
    with server() as running, relay(running.address) as seen:
        with fleet(seen.address, ["site-a"], tmp_path, app=APP, policy=policy):
            grid = running.grid(RUN)
            wait_for(lambda: grid.agents_here)
            assert ask(grid, "site-a", TRAIN, 1, b"x" * 500).has_error()
        wait_for(lambda: sums(list(read_ledger(tmp_path / "site-a")))[0] == len(seen.messages()))
    entries = list(read_ledger(tmp_path / "site-a"))
    assert sums(entries) == (len(seen.messages()), sum(map(len, seen.messages())))
    assert [entry["refusal"] for entry in entries if entry["what"] == "refusal"] == [
        {"POLICY_KEY_MAX_BYTES_PER_DAY": 100.0}
    ]
    assert entries[0]["capabilities"] == {"cores": str(os.cpu_count())}


def test_nothing_leaves_that_cannot_be_written_down(tmp_path: Path) -> None:
    """The ledger's file is a device that is always full."""
    (tmp_path / "site-a").mkdir(mode=0o700)
    (tmp_path / "site-a" / EGRESS_FILE).symlink_to("/dev/full")
    with (
        server() as running,
        relay(running.address) as seen,
        fleet(seen.address, ["site-a"], tmp_path, app=APP) as agents,
    ):
        wait_for(lambda: "egress.jsonl: no disk space is left" in agents["site-a"].status.last_error)
        assert seen.messages() == []
        assert running.agents() == []


def test_a_line_that_a_crash_cut_costs_no_other(tmp_path: Path) -> None:
    message = pb.AgentMessage(received=pb.Received(task=b"t"))
    first = EgressLedger(tmp_path / EGRESS_FILE)
    first.record(message)
    first.close()
    with (tmp_path / EGRESS_FILE).open("a") as file:
        file.write('{"what": "resu')
    second = EgressLedger(tmp_path / EGRESS_FILE)
    second.record(message)
    second.close()
    assert [entry["what"] for entry in read_ledger(tmp_path)] == ["received", "received"]
    assert (tmp_path / EGRESS_FILE).stat().st_mode & 0o777 == 0o600


def filled(home: Path, count: int) -> None:
    """A ledger of small files, with so many messages."""
    ledger = EgressLedger(home / EGRESS_FILE, most_bytes=600)
    for number in range(count):
        message = pb.AgentMessage(result=pb.Result(task=b"t", inline=b"x" * 10))
        ledger.record(message, {"round": number, "metrics": {"loss": 0.5}, "weight": 3})
    ledger.close()


def test_a_ledger_is_bounded_and_its_sums_are_over_everything(tmp_path: Path) -> None:
    filled(tmp_path, 120)
    aside = files_aside(tmp_path)
    assert len(aside) == KEPT_FILES
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in aside)
    assert sum(file.stat().st_size for file in aside) < KEPT_FILES * 2000
    entries = list(read_ledger(tmp_path))
    assert [entry["what"] for entry in entries[:2]] == ["before", "result"]
    rounds = [entry["round"] for entry in entries[1:]]
    assert rounds == list(range(rounds[0], 120)), "what is kept is without a gap"
    assert rounds[0] > 0
    sums = EgressSums()
    for entry in entries:
        sums.add(entry)
    assert (sums.messages["result"], sums.names["metric loss"], sums.names["count weight"]) == (120, 120, 120)
    size = pb.AgentMessage(result=pb.Result(task=b"t", inline=b"x" * 10)).ByteSize()
    assert sums.bytes["result"] == 120 * size
    assert next(iter(ledger_lines(entries, 5))).startswith(f"120 messages of {120 * size} bytes")


@pytest.mark.parametrize("harm", ["changed", "missing"])
def test_a_file_put_aside_that_was_changed_or_taken_out_is_found(tmp_path: Path, harm: str) -> None:
    filled(tmp_path, 20)
    (*_, middle, _last) = files_aside(tmp_path)
    if harm == "changed":
        middle.write_text(middle.read_text().replace("0.5", "0.1"))
    else:
        middle.unlink()
    with pytest.raises(StateError, match="which is missing or was changed"):
        list(read_ledger(tmp_path))


def test_a_crash_between_two_files_loses_no_sum(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    (tmp_path / EGRESS_FILE).rename(tmp_path / "egress-000099.jsonl")
    filled(tmp_path, 1)
    assert [entry["round"] for entry in read_ledger(tmp_path)] == [0, 1, 2, 0]


def test_bodies_of_any_kind_are_described() -> None:
    assert contents(b"\xff" * 9) == {"values": {"": {"bytes": 9}}}
    body = content_bytes(task_content(Task("ab", 1, b"12345")))
    values: Mapping[str, Any] = contents(body)["values"]
    assert values["task.state"] == {"bytes": 5}


def test_the_command_shows_sums_and_lines(tmp_path: Path) -> None:
    ledger = EgressLedger(tmp_path / EGRESS_FILE)
    result = pb.AgentMessage(result=pb.Result(task=b"t", inline=b"x" * 10))
    ledger.record(
        result, {"run": "a\x1b[2Jb", "round": 3, "metrics": {"loss": 0.5, "steps": 4.0}, "weight": 7}
    )
    ledger.close()
    shown = CliRunner().invoke(command_line, ["client", "ledger", "--home", str(tmp_path)])
    assert shown.exit_code == 0
    assert f"1 messages of {result.ByteSize()} bytes left this device" in shown.output
    for words in ("metric loss", "count steps", "count weight", '"loss": 0.5'):
        assert words in shown.output
    assert "\x1b" not in shown.output
    raw = CliRunner().invoke(command_line, ["client", "ledger", "--json", "--home", str(tmp_path)])
    assert json.loads(raw.output)["metrics"] == {"loss": 0.5, "steps": 4.0}
    missing = CliRunner().invoke(command_line, ["client", "ledger", "--home", str(tmp_path / "none")])
    assert missing.exit_code != 0


def test_nothing_is_sent_beside_the_ledger() -> None:
    """One place streams, one asks for a blob, one enrols: each records first."""
    sends: list[str] = []
    for path in sorted(Path(fedpeft_client.__file__).parent.rglob("*.py")):
        if path.stem == "admin_client":  # people's commands, which have no rows
            continue
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            text = ast.unparse(function)
            called = re.findall(r"call\.write\(|stub\.(?:PullBlob|Enroll)\(", text)
            sends += [f"{path.stem}.{function.name}"] * bool(called)
            assert not called or "ledger.record(" in text, function.name
    assert sorted(sends) == ["device_certificate._request_certificate", "session._write", "session.pull"]


@pytest.mark.parametrize("name", ["cores", "memory-mib"])
def test_capabilities_stay_unless_they_are_told(name: str) -> None:
    from fedpeft_client.agent import capabilities

    assert capabilities(()) == {}
    assert list(capabilities((name,))) == [name]
