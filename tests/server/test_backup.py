"""A server's state as one file: taken in the middle of a run, put back, and the run ends as it would have."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import sqlite3
import stat
import tarfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedpeft.cli import main
from fedpeft.config.run_file import build_run
from fedpeft.errors import FedPEFTError, StateError, UsageError
from fedpeft_server.ops.backup import Places, back_up, restore
from fedpeft_server.store import Rules, RunStatus, Store
from tests.server.in_memory_grid import InMemoryGrid
from tests.server.postgres import Cluster
from tests.server.store.things import checkpoint, cohort, update
from tests.server.test_supervisor import LONG_S, Daemon, tables
from tests.simulation.runs import simulated


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the undisturbed run's adapter, from the simulator."""
    finished = simulated(tables(), tmp_path_factory.mktemp("simulated")).summary.finished
    assert finished is not None
    return finished.adapter_digest


def hold_in_round_2(grid: InMemoryGrid) -> None:
    grid.hold_after = 5


def taken_in_round_2(state: Path, url: str | None, out: Path) -> tuple[str, int]:
    """A run that is backed up while its server holds round 2: its id, and who had sent an update by then."""
    with Store(state, url=url) as store:
        daemon = Daemon(store)
        daemon.prepared = hold_in_round_2
        stored = daemon.submit(tables())
        daemon.reaches(stored.id, RunStatus.RUNNING)
        assert daemon.grids[0].held.wait(LONG_S)
        back_up(Places(state, url), out)
        assert stat.S_IMODE(out.stat().st_mode) == 0o600
        ((_, sender),) = [came for came in daemon.grids[0].worked if came[0] == 2]
        assert daemon.supervisor.drain(LONG_S)
    return stored.id, sender


def ends(state: Path, url: str | None, run_id: str) -> tuple[str, set[int]]:
    """The digest of the adapter that a new server comes to, and who was asked in round 2."""
    with Store(state, url=url) as store:
        daemon = Daemon(store)
        daemon.supervisor.start()
        stored = daemon.ended(run_id)
        assert stored.status == RunStatus.FINISHED, stored.reason
        return stored.adapter_digest, {node for round_, node in daemon.grids[0].worked if round_ == 2}


@pytest.mark.slow
def test_a_run_ends_with_the_same_bytes_from_a_backup_of_its_middle(tmp_path: Path, adapter: str) -> None:
    run_id, sender = taken_in_round_2(tmp_path / "state", None, tmp_path / "b.tar")
    shutil.rmtree(tmp_path / "state")
    restore(tmp_path / "b.tar", Places(tmp_path / "state"))
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
    digest, asked = ends(tmp_path / "state", None, run_id)
    assert digest == adapter
    assert len(asked) == 3
    assert sender not in asked, "its update was accepted before the backup"


@pytest.mark.slow
def test_a_backup_goes_from_one_kind_of_database_to_another(
    tmp_path: Path, adapter: str, cluster: Cluster
) -> None:
    """A real run on PostgreSQL, taken to SQLite in its middle, and from there to another PostgreSQL."""
    run_id, _ = taken_in_round_2(tmp_path / "one", cluster.url("one"), tmp_path / "b.tar")
    restore(tmp_path / "b.tar", Places(tmp_path / "two"))
    back_up(Places(tmp_path / "two"), tmp_path / "c.tar")
    target = cluster.url("three")
    restore(tmp_path / "c.tar", Places(tmp_path / "three", target))
    assert not (tmp_path / "three" / "state.db").exists()
    for state, url in ((tmp_path / "two", None), (tmp_path / "three", target)):
        assert ends(state, url, run_id)[0] == adapter
    with pytest.raises(StateError, match="has rows in"):
        restore(tmp_path / "c.tar", Places(tmp_path / "four", target))
    assert not (tmp_path / "four").exists()


def small_state(folder: Path, **more: Any) -> str:
    """A run whose round 1 is open, with an update in a blob; its id."""
    with Store(folder) as store:
        run = build_run({"run": {"name": "small", "rounds": 3}, **more}, source="test")
        stored = store.runs.submit(run, Rules(), submission="one", submitter="me")
        store.rounds(stored).commit(checkpoint(stored, 0))
        store.rounds(stored).open_round(1, cohort)
        came = update(stored, 1, "ann", b"x" * 100_000)
        store.blobs.put(came.body or b"")
        store.results.accept([update(stored, 1, "bob"), came.__class__(**(vars(came) | {"body": None}))])
        return stored.id


def test_contents_that_nothing_refers_to_stay_behind(tmp_path: Path) -> None:
    small_state(tmp_path / "state")
    with Store(tmp_path / "state") as store:
        store.blobs.put(b"nobody's")
    manifest = back_up(Places(tmp_path / "state"), tmp_path / "b.tar")
    assert sorted(name.split("/")[0] for name in manifest.files) == [
        "audit.head",
        "blobs",
        "blobs",
        "state.db",
    ]
    assert not list((tmp_path / "state").glob(".backup-*"))
    restore(tmp_path / "b.tar", Places(tmp_path / "again"))
    with Store(tmp_path / "again") as store:
        (stored,) = store.runs.list()
        assert store.rounds(stored).latest() is not None
        assert [kept.size for kept in store.results.recall(stored.id, 1, "train")] == [
            100_000,
            len("bob in round 1"),
        ]


def test_the_audit_log_comes_along_and_says_that_it_was_restored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small_state(tmp_path / "state")
    back_up(Places(tmp_path / "state"), tmp_path / "b.tar")
    restore(tmp_path / "b.tar", Places(tmp_path / "again"), nothing_since=True)
    with Store(tmp_path / "again"):
        pass
    assert called("server", "audit", "--state", str(tmp_path / "again"), "--json") == 0
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["action"] for entry in entries[:-1]] == ["began", "submitted", "restored"]
    for folder in ("state", "again"):  # a restored state is a private one
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700
        assert stat.S_IMODE((tmp_path / folder / "audit.head").stat().st_mode) == 0o600


def flipped(content: bytes, at: bytes) -> bytes:
    """The content with one bit of `at` changed."""
    place = content.index(at)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "a changed content": (lambda content: flipped(content, b"x" * 100), "is damaged"),
    "a cut file": (lambda content: content[: len(content) // 2], "cut off|missing"),
    "no backup": (lambda content: b"nothing of the kind" * 1000, "no backup"),
    "a changed manifest": (lambda content: content.replace(b'"software"', b'"software!', 1), "damaged"),
    "a later format": (lambda content: content.replace(b'"format": 1', b'"format": 2', 1), "of format 2"),
}


@pytest.mark.parametrize("name", sorted(DAMAGES))
def test_a_damaged_backup_puts_nothing_in_place(tmp_path: Path, name: str) -> None:
    small_state(tmp_path / "state")
    back_up(Places(tmp_path / "state"), tmp_path / "b.tar")
    damage, says = DAMAGES[name]
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(damage(whole))
    assert (tmp_path / "b.tar").read_bytes() != whole
    with pytest.raises(FedPEFTError, match=says):
        restore(tmp_path / "b.tar", Places(tmp_path / "again"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar", "state"]


def test_no_name_leads_out_of_the_folder(tmp_path: Path) -> None:
    for name in ("../outside", str(tmp_path / "outside")):
        digest = hashlib.sha256(b"x").hexdigest()
        manifest = {
            "format": 1,
            "software": "x",
            "taken_at": 0.0,
            "files": {"state.db": digest, name: digest},
        }
        with tarfile.open(tmp_path / "b.tar", "w") as tar:
            for member, content in (("manifest.json", json.dumps(manifest).encode()), (name, b"x")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        with pytest.raises(StateError, match="does not name"):
            restore(tmp_path / "b.tar", Places(tmp_path / "again"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["b.tar"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    small_state(tmp_path / "state")
    back_up(Places(tmp_path / "state"), tmp_path / "b.tar")
    with pytest.raises(UsageError, match="there already"):
        back_up(Places(tmp_path / "state"), tmp_path / "b.tar")
    with pytest.raises(UsageError, match="there already and not empty"):
        restore(tmp_path / "b.tar", Places(tmp_path / "state"))
    with pytest.raises(StateError, match="holds no server's state"):
        back_up(Places(tmp_path / "nowhere"), tmp_path / "c.tar")


@pytest.mark.parametrize("nothing_since", [False, True])
def test_a_private_run_goes_on_only_if_nothing_was_released_since(
    tmp_path: Path, nothing_since: bool
) -> None:
    privacy = {"kind": "client-level", "clip_norm": 1.0, "noise_multiplier": 1.0, "max_epsilon": 9.0}
    run_id = small_state(tmp_path / "state", privacy=privacy | {"target_delta": 1e-5})
    back_up(Places(tmp_path / "state"), tmp_path / "b.tar")
    restore(tmp_path / "b.tar", Places(tmp_path / "again"), nothing_since=nothing_since)
    with Store(tmp_path / "again") as store:
        stored = store.runs.get(run_id)
    assert stored.status == (RunStatus.QUEUED if nothing_since else RunStatus.STOPPED)
    assert ("not known" in stored.reason) != nothing_since


def test_the_commands_take_the_keys_along_when_they_are_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    small_state(tmp_path / "state")
    called("provision", "federation", "--host", "localhost")
    (tmp_path / "server.toml").write_text(
        'state = "state"\n[tls]\nkeys = "federation/server"\nauthority = "federation/ca"\n'
    )
    called("server", "backup", "bare.tar", "--config", "server.toml")
    capsys.readouterr()
    called("server", "backup", "b.tar", "--config", "server.toml", "--with-keys", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == (tmp_path / "b.tar").stat().st_size
    kept = {
        path.relative_to(tmp_path): path.read_bytes()
        for name in ("server", "ca")
        for path in (tmp_path / "federation" / name).rglob("*")
        if path.is_file()
    }
    with tarfile.open(tmp_path / "bare.tar") as bare:
        assert {name.split("/")[0] for name in bare.getnames()} == {
            "manifest.json",
            "audit.head",
            "state.db",
            "blobs",
        }
    shutil.rmtree(tmp_path / "state")
    shutil.rmtree(tmp_path / "federation")
    assert called("server", "restore", "bare.tar", "--config", "server.toml", "--with-keys") == 2
    assert "without --with-keys" in capsys.readouterr().err
    called("server", "restore", "b.tar", "--config", "server.toml", "--with-keys")
    assert {path: (tmp_path / path).read_bytes() for path in kept} == kept
    assert all(stat.S_IMODE((tmp_path / path).stat().st_mode) == 0o600 for path in kept)
    with closing(sqlite3.connect(tmp_path / "state" / "state.db")) as database:
        assert database.execute("SELECT count(*) FROM updates").fetchone() == (2,)


def called(*words: str) -> int:
    """A command's exit code."""
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)
