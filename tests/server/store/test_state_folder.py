"""A server's state is its owner's alone, and never begins anew beside what it held."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from fedpeft.cli import main
from fedpeft.errors import StateError
from fedpeft_server.ops.backup import Places, back_up, restore
from fedpeft_server.store import Store
from tests.server.postgres import Cluster
from tests.server.test_backup import small_state


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("bits", [0o040, 0o010, 0o005, 0o020, 0o001, 0o755 - 0o700])
def test_a_state_folder_that_others_can_use_is_refused(tmp_path: Path, bits: int) -> None:
    state = tmp_path / "state"
    with Store(state):
        assert mode(state) == 0o700
    state.chmod(0o700 | bits)
    with pytest.raises(StateError, match=f"its mode is 0{0o700 | bits:o}.* run: chmod 700 '{state}'"):
        Store(state)
    assert mode(state) == 0o700 | bits, "what others may have read is for the owner to think about"
    state.chmod(0o700)
    with Store(state):
        pass


def test_a_folder_made_under_any_umask_is_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with Store(tmp_path / "state"):
            pass
    finally:
        os.umask(before)
    assert mode(tmp_path / "state") == 0o700


@pytest.mark.parametrize("left", ["all", "runs", "blobs", "audit.head"])
def test_a_missing_database_is_no_empty_start(tmp_path: Path, left: str) -> None:
    state = tmp_path / "state"
    run_id = small_state(state)
    (state / "runs" / run_id).mkdir()
    for name in ("state.db", "state.db-wal", "state.db-shm"):
        (state / name).unlink(missing_ok=True)
    for name in ("runs", "blobs", "audit.head"):
        if left not in ("all", name):
            place = state / name
            shutil.rmtree(place) if place.is_dir() else place.unlink()
    there = sorted(path.relative_to(state) for path in state.rglob("*"))
    for _ in range(2):  # the first refusal leaves nothing that the second would take for a state
        with pytest.raises(StateError, match=r"state.db is missing, and .* say that this state has begun"):
            Store(state)
    assert sorted(path.relative_to(state) for path in state.rglob("*")) == there


def test_an_empty_folder_is_an_empty_start(tmp_path: Path) -> None:
    for name in ("blobs", "runs"):  # as a start leaves them that was killed before its database was made
        (tmp_path / "state" / name).mkdir(parents=True, mode=0o700)
    (tmp_path / "state").chmod(0o700)
    with Store(tmp_path / "state") as store:
        assert store.runs.list() == []


def test_another_database_that_is_empty_is_refused_too(tmp_path: Path) -> None:
    small_state(tmp_path / "state")
    with pytest.raises(StateError, match="holds no tables of a server"):
        Store(tmp_path / "state", url=f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.raises(StateError, match="holds no tables of a server"):
        Store(tmp_path / "state", url=f"sqlite:///{tmp_path / 'other.db'}")


@pytest.mark.slow
def test_an_empty_postgresql_beside_a_state_is_refused(tmp_path: Path, cluster: Cluster) -> None:
    small_state(tmp_path / "state")
    with pytest.raises(StateError, match="holds no tables of a server"):
        Store(tmp_path / "state", url=cluster.url("empty_beside"))


def test_a_database_without_its_contents_is_refused(tmp_path: Path) -> None:
    small_state(tmp_path / "state")
    shutil.rmtree(tmp_path / "state" / "blobs")
    with pytest.raises(StateError, match="blobs is missing, and the database names 2 contents in it"):
        Store(tmp_path / "state")


def test_a_backup_of_nothing_makes_no_tables(tmp_path: Path) -> None:
    """A database that somebody mistyped stays as it is."""
    small_state(tmp_path / "state")
    for name in ("state.db", "audit.head"):
        (tmp_path / "state" / name).unlink()
    with pytest.raises(StateError, match="is not there"):
        back_up(Places(tmp_path / "state"), tmp_path / "b.tar")
    assert not (tmp_path / "state" / "state.db").exists()


def test_what_backup_and_restore_write_is_private(tmp_path: Path) -> None:
    small_state(tmp_path / "state")
    with pytest.raises(SystemExit):
        main(["provision", str(tmp_path / "federation"), "--host", "localhost"])
    keys, authority = tmp_path / "federation" / "server", tmp_path / "federation" / "ca"
    back_up(Places(tmp_path / "state", keys=keys, authority=authority), tmp_path / "b.tar")
    assert mode(tmp_path / "b.tar") == 0o600
    again = [tmp_path / "again" / name for name in ("state", "keys", "ca")]
    restore(tmp_path / "b.tar", Places(again[0], keys=again[1], authority=again[2]))
    for folder in again:
        assert mode(folder) == 0o700, folder
        written = [file for file in folder.rglob("*") if file.is_file() and "db-" not in file.name]
        assert [file for file in written if mode(file) & 0o077] == []
