"""Packages of others: found by entry point or decorator, loaded late, compared between ends."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.compatibility import conflicts_of
from fedpeft.config.device_task import device_task
from fedpeft.config.run_file import build_run
from fedpeft.config.run_plugins import plugins_of, plugins_text
from fedpeft.errors import FederationError, MissingExtraError, PolicyError, StateError, UsageError, codes_of
from fedpeft.participant.loaded_run import drop_loaded_run
from fedpeft.planning.preflight import problems_of
from fedpeft.plugins import GROUPS, EntryTable, allow_plugins, plugin_of, register
from fedpeft.rounds.strategy_table import RULES
from fedpeft.runtime.frames import Frame
from fedpeft.stages import STAGES
from fedpeft.transport.record_bytes import content_bytes
from fedpeft.transport.roster import check_plugins
from fedpeft.transport.tasks import Hello, task_content
from fedpeft.wire.failures import from_record
from fedpeft.wire.task_content import Task
from fedpeft.wire.task_kinds import HELLO
from fedpeft_client.workers.worker import execute_order
from fedpeft_client.workers.worker_process import CLIENT_APP
from tests.simulation.conftest import tiny_tables
from tests.simulation.runs import fingerprint, resumed, simulated
from tests.support.plugins import SOURCE, install_example

MODULE = "fedpeft_example"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The example package, installed."""
    sys.modules.pop(MODULE, None)
    folder = install_example(tmp_path / "packages")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    allow_plugins(None)
    sys.modules.pop(MODULE, None)


def tables(**more: Any) -> dict[str, Any]:
    return {"run": {"name": "p", "rounds": 2}, "peft": {"method": "lora", "r": 2}, **more}


def test_nothing_is_imported_before_a_run_asks(example: Path) -> None:
    assert "halve" in STAGES
    assert {"slow-start", "middle"} <= set(RULES)
    plugin = plugin_of("stages", "halve")
    assert plugin is not None
    assert (plugin.name, plugin.version) == ("fedpeft-example", "1.0")
    assert MODULE not in sys.modules
    assert STAGES["halve"].__name__ == "Halve"
    assert MODULE in sys.modules


def test_names_that_no_one_offers_are_refused_with_what_there_is(example: Path) -> None:
    (problem,) = problems_of(build_run(tables(stages=[{"kind": "halves"}]), source="test"))
    assert "did you mean 'halve'?" in problem
    run = build_run(tables(output={"sinks": ["nowhere"]}), source="test")
    assert any(problem.startswith("output.sinks: unknown kind 'nowhere'") for problem in problems_of(run))
    with pytest.raises(KeyError):
        STAGES["halves"]


def test_what_a_strategy_declares_decides_where_it_is_refused(example: Path) -> None:
    buffered = {"mode": "buffered", "buffer": {"size": 2, "concurrency": 2}}
    for kind, code in (("middle", "strategy-needs-each-buffered"), ("slow-start", None)):
        run = build_run(tables(federation={**buffered, "strategy": kind}), source="test")
        assert codes_of(conflicts_of(run)) == ([code] if code else [])
    rolora = build_run(tables(federation={"strategy": "slow-start", "lora_rule": "rolora"}), source="test")
    assert codes_of(conflicts_of(rolora)) == ["strategy-moves-resting"]
    wrong = build_run(tables(federation={"strategy": {"kind": "slow-start", "turns": 3}}), source="test")
    assert any("it takes rounds" in problem for problem in problems_of(wrong))


def test_plugins_of_one_run_and_how_ends_differ(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build_run(tables(stages=[{"kind": "halve"}], federation={"strategy": "middle"}), source="test")
    (plugin,) = plugins_of(run)
    assert plugins_of(build_run(tables(), source="test")) == ()
    ours = plugins_text([plugin])
    check_plugins(Hello("a", 1, "", ours), ours)
    changed = install_example(tmp_path / "other", change="\n# another build\n")
    monkeypatch.syspath_prepend(str(changed))
    (other,) = plugins_of(run)
    assert other.version == plugin.version
    assert other.digest != plugin.digest
    for theirs in (plugins_text([other]), "", "{", "[[1]]", '[["a","b","c"]]'):
        with pytest.raises(
            FederationError, match=r"^a: the run's plugins differ at both ends: it has .*1\.0"
        ):
            check_plugins(Hello("a", 1, "", theirs), ours)


@pytest.mark.slow
def test_runs_with_plugins_are_simulated_and_resumed(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halving and doubling changes no bit; a strategy's state is in the checkpoint."""
    mine = tiny_tables() | {
        "stages": [{"kind": "halve"}],
        "federation": {"strategy": {"kind": "slow-start", "rounds": 3}},
        "output": {"sinks": ["lines"]},
    }
    whole = simulated(mine, tmp_path / "whole", workers=2).folder
    assert (whole / "lines.txt").read_text().splitlines() == ["Started", "Round", "Round", "Round", "Round"]
    started = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    assert started["versions"]["plugin fedpeft-example"].startswith("1.0 ")
    plain = simulated(mine | {"stages": []}, tmp_path / "plain").folder
    assert fingerprint(whole)["adapter"] == fingerprint(plain)["adapter"]

    stopped = simulated(mine, tmp_path / "stopped").folder
    interrupted(stopped, after=1)
    resumed(stopped)
    assert fingerprint(stopped)["adapter"] == fingerprint(whole)["adapter"]

    interrupted(stopped, after=1)
    monkeypatch.syspath_prepend(str(install_example(tmp_path / "newer", version="2.0")))
    sys.modules.pop(MODULE)
    with pytest.raises(StateError, match=r"begun with plugin fedpeft-example 1\.0 .* and 2\.0 "):
        resumed(stopped)


def interrupted(folder: Path, *, after: int) -> None:
    """Make a finished run one that ended after a round."""
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    kept = [line for line in rows if json.loads(line)["event"] == "started"]
    kept += [line for line in rows if json.loads(line).get("round", after + 1) <= after]
    (folder / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    for checkpoint in (folder / "checkpoints").iterdir():
        if int("".join(filter(str.isdigit, checkpoint.stem))) > after:
            checkpoint.unlink()
    (folder / "summary.json").unlink()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_an_owner_lists_what_may_be_loaded(example: Path, tmp_path: Path) -> None:
    data = {"train": "nowhere", "prompt": "{prompt}", "answer": "{answer}", "heldout": 0.0}
    task = device_task(build_run(tables(data=data, stages=[{"kind": "halve"}]), source="test"))
    rows = tmp_path / "a.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n} ", "answer": str(n)}) + "\n" for n in range(8)))
    header: dict[str, Any] = {
        "app": CLIENT_APP,
        "kind": HELLO,
        "group": "0",
        "run_digest": task.digest,
        "client": "a",
    }
    header |= {"device_task": task.text, "data": str(rows), "model": "", "base_digests": []}
    content = content_bytes(task_content(Task(task.digest, 0, b"", device_task=task.text)))
    refused = from_record(execute_order(Frame(header, {"content": content, "memory": b""})).header["error"])
    assert isinstance(refused, PolicyError)
    assert refused.limits == {"plugins": None}
    assert "fedpeft-example 1.0" in str(refused)
    assert MODULE not in sys.modules
    listed = Frame({**header, "plugins": ["fedpeft_example"]}, {"content": content, "memory": b""})
    assert execute_order(listed).header["error"] is None
    drop_loaded_run(task.digest)


def test_what_is_no_entry_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = install_example(tmp_path / "packages", change="\nraise RuntimeError('two\\nlines')\n")
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(MissingExtraError, match=r"'halve' .*fedpeft-example.* RuntimeError: two lines;"):
        STAGES["halve"]
    with pytest.raises(UsageError, match="there are stages, strategies"):
        register("stage", "x")
    for table, group in ((STAGES, "stages"), (RULES, "strategies")):
        register(group, "nothing")(object())
        with pytest.raises(MissingExtraError, match="the plugin 'nothing'"):
            table["nothing"]
        del table["nothing"]


def test_ours_come_first() -> None:
    table: EntryTable[str] = EntryTable("stages", {"clip": "ours"})
    register("stages", "clip")("theirs")
    try:
        assert table["clip"] == "ours"
        assert list(table).count("clip") == 1
    finally:
        del table["clip"]


class Doubling:
    """Twice the mean."""

    traits = frozenset(RULES["fedavgm"].declares)

    def __init__(self, *, times: float = 2.0) -> None:
        self.times, self.state = times, dict[str, Any]()

    def step(self, number: int, mean: dict[str, Any]) -> dict[str, Any]:
        """So many times the mean."""
        return {name: np.multiply(array, self.times) for name, array in mean.items()}


def test_a_strategy_of_this_process_needs_no_base_class(tmp_path: Path) -> None:
    register("strategies", "doubling")(Doubling)
    try:
        mine = tiny_tables() | {"federation": {"strategy": {"kind": "doubling", "times": 1.0}}}
        ours = simulated(mine, tmp_path / "mine").folder
        mean = simulated(tiny_tables(), tmp_path / "mean").folder
        assert fingerprint(ours)["adapter"] == fingerprint(mean)["adapter"]
    finally:
        del RULES["doubling"]


def test_the_command_line_starts_without_looking_for_plugins() -> None:
    code = "import fedpeft.cli, sys; assert 'fedpeft.plugins' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_example_names_every_group_that_there_is() -> None:
    assert set(GROUPS) >= {
        line.split('"')[1].removeprefix("fedpeft.")
        for line in (SOURCE / "pyproject.toml").read_text().splitlines()
        if "entry-points" in line
    }
