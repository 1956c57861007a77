"""The folder of a run: begun, held by one, gone on with, replaced only when asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from fedpeft.config.run_file import build_run, run_digest, run_json, run_toml
from fedpeft.config.sections import RunConfig
from fedpeft.errors import RunExistsError, RunFileError, StateError, StorageError
from fedpeft.ledger import Checkpoint, RunFolder
from fedpeft.ledger.records import Baseline, Evaluation, Finished, Round, Started

STARTED = Started(
    run_name="x", run_digest="d", seed=0, rounds=3, engine="local", clients={"a": 1}, test_examples=1,
    trainable_parameters=1, total_parameters=1, base_digest="e", cut_rows=0, primary_metric="m",
    higher_is_better={"m": True}, versions={},
)  # fmt: skip
FINISHED = Finished(rounds=3, adapter_digest="f", bytes_up_per_client=0, bytes_down_per_client=0)
BASELINE = Baseline(name="zero-shot", evaluations={"zero-shot": Evaluation(scores={})})


def run_of(keep: int | None = None, seed: int = 0) -> RunConfig:
    table = {
        "run": {"name": "x", "rounds": 3, "seed": seed},
        "data": {"partitioner": {"kind": "iid", "clients": 2}},
        "output": {} if keep is None else {"keep_checkpoints": keep},
    }
    return build_run(table, source="x")


RUN = run_of()


def checkpoint(round_: int, run: RunConfig = RUN) -> Checkpoint:
    return Checkpoint(run_digest(run), round_, {"a": np.full(2, round_, np.float32)}, Round(round=round_))


def begun(path: Path, rounds: int, run: RunConfig = RUN) -> None:
    """A run that stopped after so many rounds."""
    with RunFolder.create(path, run) as folder:
        folder.append(STARTED)
        for round_ in range(rounds + 1):
            folder.commit(checkpoint(round_, run))


def test_a_run_is_begun_and_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "deep" / "x"
    begun(path, rounds=1)
    with RunFolder.resume(path) as folder:
        assert folder.run == RUN
        assert folder.digest == run_digest(RUN)
        last = folder.latest()
        assert last is not None
        assert (last.round, last.state["a"].tolist()) == (1, [1.0, 1.0])
        assert folder.rows() == [STARTED, Round(round=0), Round(round=1)]
        assert folder.read_start() == STARTED
        assert folder.read_end() is None


def test_a_new_folder_has_nothing_yet(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "x", RUN) as folder:
        assert (folder.rows(), folder.latest(), folder.read_start(), folder.baselines()) == (
            [],
            None,
            None,
            [],
        )


def test_a_run_is_replaced_only_by_force_and_other_files_stay(tmp_path: Path) -> None:
    begun(tmp_path, rounds=2)
    (tmp_path / "notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RunExistsError, match=r"--resume .*--force.*--out"):
        RunFolder.create(tmp_path, run_of(seed=1))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    with RunFolder.create(tmp_path, run_of(seed=1), force=True) as folder:
        assert (folder.rows(), folder.latest()) == ([], None)
        assert folder.run.run.seed == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_one_at_a_time(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path, RUN):
        with pytest.raises(StateError, match="in use"):
            RunFolder.create(tmp_path, RUN, force=True)
        with pytest.raises(StateError, match="in use"):
            RunFolder.resume(tmp_path)
    RunFolder.resume(tmp_path).__exit__(None, None, None)
    with pytest.raises(RunExistsError):
        RunFolder.create(tmp_path, RUN)
    with RunFolder.resume(tmp_path):  # a refusal holds no lock
        pass


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from fedpeft.ledger import RunFolder
        with RunFolder.resume(Path(sys.argv[1])):
            print("held", flush=True)
            time.sleep(60)
    """
    begun(tmp_path, rounds=0)
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder.stdout:
        try:
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(StateError, match="in use"):
                RunFolder.resume(tmp_path)
        finally:
            os.kill(holder.pid, signal.SIGKILL)
            holder.wait()
    with RunFolder.resume(tmp_path) as folder:
        assert folder.latest() is not None


def test_a_last_row_that_was_cut_short_is_read_around(tmp_path: Path) -> None:
    begun(tmp_path, rounds=1)
    rows = tmp_path / "metrics.jsonl"
    whole = rows.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for length in range(start, len(whole) - 1, 9):
        rows.write_bytes(whole[:length])
        with RunFolder.resume(tmp_path) as folder:
            assert folder.rows() == [STARTED, Round(round=0)]
            folder.realign(folder.latest())
            assert rows.read_bytes() == whole
            folder.append(Round(round=2))
            assert folder.rows()[-1] == Round(round=2)


@pytest.mark.parametrize("bad", [b"{", b'{"event":"unheard"}', b"\xff"])
def test_a_broken_row_in_the_middle_is_refused(tmp_path: Path, bad: bytes) -> None:
    begun(tmp_path, rounds=1)
    rows = tmp_path / "metrics.jsonl"
    lines = rows.read_bytes().split(b"\n")
    lines[1] = bad
    rows.write_bytes(b"\n".join(lines))
    with RunFolder.resume(tmp_path) as folder, pytest.raises(StateError, match="line 2"):
        folder.rows()


def test_rows_follow_the_checkpoints(tmp_path: Path) -> None:
    """A crash between checkpoint and row, or rows of rounds whose checkpoint was deleted."""
    begun(tmp_path, rounds=2)
    with RunFolder.resume(tmp_path) as folder:
        folder.append(FINISHED)
        (tmp_path / "checkpoints" / "round-000002.safetensors").unlink()
        folder.realign(folder.latest())
        assert folder.rows() == [STARTED, Round(round=0), Round(round=1)]
        for path in (tmp_path / "checkpoints").iterdir():
            path.unlink()
        folder.realign(folder.latest())
        assert folder.rows() == []


def test_baselines_survive_a_resume_after_the_last_round(tmp_path: Path) -> None:
    begun(tmp_path, rounds=3)
    with RunFolder.resume(tmp_path) as folder:
        folder.append(BASELINE)
        folder.append(FINISHED)
        folder.realign(folder.latest())
        assert folder.baselines() == [BASELINE]
        assert folder.rows()[-1] == BASELINE


def test_a_run_is_finished_when_all_it_promises_is_there(tmp_path: Path) -> None:
    begun(tmp_path, rounds=3)
    with RunFolder.resume(tmp_path) as folder:
        folder.append(FINISHED)
        assert folder.read_end() is None
        folder.adapter.mkdir()
        assert folder.read_end() is None
        (tmp_path / "report.html").touch()
        assert folder.read_end() == FINISHED


@pytest.mark.parametrize("keep", [None, 1, 2])
def test_old_checkpoints_go_as_the_run_file_says(tmp_path: Path, keep: int | None) -> None:
    begun(tmp_path, rounds=3, run=run_of(keep))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    numbers = range(4) if keep is None else range(4 - keep, 4)
    assert kept == [f"round-{number:06d}.safetensors" for number in numbers]


def test_half_written_files_of_a_crash_are_removed(tmp_path: Path) -> None:
    begun(tmp_path, rounds=1)
    for name in (".partial-x", "checkpoints/.partial-y"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".partial-folder").mkdir()
    with RunFolder.resume(tmp_path) as folder:
        assert folder.latest() is not None
    assert not list(tmp_path.rglob(".partial-*"))


def test_a_run_file_that_was_edited_since_is_refused_by_its_keys(tmp_path: Path) -> None:
    begun(tmp_path, rounds=1)
    file = tmp_path / "run.toml"
    was = file.read_text()
    file.write_text(was.replace("seed = 0", "seed = 5"))
    with pytest.raises(StateError, match=r"was changed since the run began \(run.seed\)"):
        RunFolder.resume(tmp_path)
    file.write_text("# a remark\n" + was)
    with RunFolder.resume(tmp_path) as folder:
        assert folder.latest() is not None


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    begun(tmp_path, rounds=1)
    other = build_run({**RUN.model_dump(), "run": {**RUN.run.model_dump(), "seed": 5}}, source="other")
    (tmp_path / "run.json").write_text(run_json(other))
    (tmp_path / "run.toml").write_text(run_toml(other))
    with RunFolder.resume(tmp_path) as folder, pytest.raises(StateError, match="is of run"):
        folder.latest()


def test_a_run_that_was_killed_before_its_run_file_was_written_goes_on(tmp_path: Path) -> None:
    begun(tmp_path, rounds=0)
    was = (tmp_path / "run.toml").read_bytes()
    (tmp_path / "run.toml").unlink()
    with RunFolder.resume(tmp_path) as folder:
        assert folder.run == RUN
    assert (tmp_path / "run.toml").read_bytes() == was


@pytest.mark.parametrize(
    "name", ["run.toml", "report.html", "adapter/mine.txt", "checkpoints/x", "summary.json"]
)
@pytest.mark.parametrize("force", [False, True])
def test_files_of_others_are_neither_deleted_nor_replaced(tmp_path: Path, name: str, force: bool) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunExistsError, match="no run folder and holds"):
        RunFolder.create(tmp_path, RUN, force=force)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    assert (tmp_path / name).read_text() == "mine"


def test_what_is_no_run_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="holds no run"):
        RunFolder.resume(tmp_path)
    begun(tmp_path / "x", rounds=0)
    (tmp_path / "x" / "run.toml").write_text("[run]\nrounds = 0\n")
    with pytest.raises(RunFileError):
        RunFolder.resume(tmp_path / "x")
    with pytest.raises(RunExistsError):  # and the lock was given back
        RunFolder.create(tmp_path / "x", RUN)


def test_a_place_where_no_folder_can_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        RunFolder.create(tmp_path / "file" / "x", RUN)
