"""Entries are only ever added: what is changed, taken out, moved or cut off is found and said."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from fedpeft.cli import main
from fedpeft.config.run_file import build_run
from fedpeft.errors import UsageError
from fedpeft_server.store import Rules, Store
from fedpeft_server.store.audit_log import HEAD, Action, Actor, AuditEntry, Head, find_faults, read_entries
from tests.server.store.things import rows

ADA = Actor("ada", "submitter")


def filled(folder: Path, count: int = 5) -> list[AuditEntry]:
    """A state whose log has the entry that begins it and `count` more."""
    with Store(folder) as store:
        for number in range(count):
            store.audit.record(ADA, Action.PULLED, f"run-{number}", round=number)
        return list(read_entries(store.database))


def audited(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """The exit code of `fedpeft server audit --verify`, and what it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["server", "audit", "--state", str(folder), "--verify", *options])
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out + printed.err


def change(folder: Path, *statements: str) -> None:
    with closing(sqlite3.connect(folder / "state.db")) as database, database:
        for statement in statements:
            database.execute(statement)


def test_each_entry_follows_the_one_before(tmp_path: Path, url: str | None) -> None:
    with Store(tmp_path / "state", url=url) as store:
        for number in range(3):
            store.audit.record(ADA, Action.PULLED, f"run-{number}", text="a \x1b[31m name \u2603", at=0.25)
        entries = list(read_entries(store.database))
        assert [entry.number for entry in entries] == [1, 2, 3, 4]
        assert find_faults(iter(entries), [("a note", entries[1].head)]) == ([], entries[-1].head)
        assert Head.parse((store.folder / HEAD).read_text()) == entries[-1].head
        assert stat.S_IMODE((store.folder / HEAD).stat().st_mode) == 0o600


def test_a_submit_and_its_entry_are_one_transaction(store: Store) -> None:
    run = build_run({"run": {"name": "one", "rounds": 3}}, source="test")
    store.runs.submit(run, Rules(), submission="a", submitter="ada", readers=("bob",))
    store.runs.submit(run, Rules(), submission="a", submitter="ada")
    other = build_run({"run": {"name": "one", "rounds": 4}}, source="test")
    with pytest.raises(UsageError):
        store.runs.submit(other, Rules(), submission="a", submitter="ada")
    (entry,) = [entry for entry in read_entries(store.database) if entry.action == Action.SUBMITTED]
    assert (entry.actor, entry.role, entry.subject) == ("ada", "submitter", "one-1")
    assert json.loads(entry.detail)["readers"] == "bob"


def test_entries_of_many_threads_are_one_chain(tmp_path: Path) -> None:
    with Store(tmp_path / "state") as store:

        def work(name: str) -> None:
            for number in range(10):
                store.audit.record(Actor(name, "admin"), Action.PULLED, f"run-{number}")

        threads = [threading.Thread(target=work, args=(f"person-{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        faults, last = find_faults(read_entries(store.database), [])
        assert (faults, last is not None and last.number) == ([], 41)
        assert str(last) == (store.folder / HEAD).read_text().strip()


# What somebody with the database's file does to it, and what is said.
TAMPERED: dict[str, tuple[tuple[str, ...], str]] = {
    "changed": (("UPDATE audit SET actor = 'bob' WHERE number = 3",), "entry 3 was changed"),
    "a later time": (("UPDATE audit SET at_ms = at_ms + 1 WHERE number = 2",), "entry 2 was changed"),
    "deleted": (("DELETE FROM audit WHERE number = 3",), "entry 3 is missing"),
    "several deleted": (("DELETE FROM audit WHERE number IN (3, 4)",), "entry 3 to 4 is missing"),
    "the first deleted": (("DELETE FROM audit WHERE number = 1",), "entry 1 is missing"),
    "deleted and closed up": (
        ("DELETE FROM audit WHERE number = 3", "UPDATE audit SET number = number - 1 WHERE number > 3"),
        "entry 3 was changed",
    ),
    "reordered": (
        (
            "UPDATE audit SET number = 99 WHERE number = 3",
            "UPDATE audit SET number = 3 WHERE number = 4",
            "UPDATE audit SET number = 4 WHERE number = 99",
        ),
        "entry 3 was changed, or stood after another entry",
    ),
    "cut off": (("DELETE FROM audit WHERE number > 4",), "entry 6, which .*audit.head names, is missing"),
    "emptied": (("DELETE FROM audit",), "there is no entry at all"),
    "written into": (
        ("INSERT INTO audit SELECT 7, at_ms, actor, role, action, subject, detail, digest FROM audit WHERE"
         " number = 6",),
        "entry 7 was changed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TAMPERED))
def test_what_was_done_to_the_log_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    entries = filled(tmp_path / "state")
    code, said = audited(tmp_path / "state", capsys)
    assert code == 0
    assert f"last     {entries[-1].head}" in said
    statements, says = TAMPERED[name]
    change(tmp_path / "state", *statements)
    code, said = audited(tmp_path / "state", capsys)
    assert code == 7
    assert "is not as it was written" in said
    assert re.search(says, said), said


def rewritten(folder: Path, change_one: Callable[[AuditEntry], AuditEntry]) -> None:
    """The whole table with sound digests, and the file beside it: all that the folder's owner can do."""
    with Store(folder) as store:
        entries, previous, made = list(read_entries(store.database)), "0" * 64, []
        for entry in map(change_one, entries):
            digest = entry.digest_after(previous)
            made.append(AuditEntry(**(vars(entry) | {"digest": digest})))
            previous = digest
    with closing(sqlite3.connect(folder / "state.db")) as database, database:
        for entry in made:
            where = (entry.actor, entry.digest, entry.number)
            database.execute("UPDATE audit SET actor = ?, digest = ? WHERE number = ?", where)
    (folder / HEAD).write_text(f"{made[-1].head}\n")


def test_a_log_that_was_written_anew_or_cut_with_its_file_is_found_by_what_was_noted_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = filled(tmp_path / "state")
    noted = ("--known", str(entries[3].head))
    assert audited(tmp_path / "state", capsys, *noted)[0] == 0
    shutil.copytree(tmp_path / "state", tmp_path / "cut")
    shutil.copytree(tmp_path / "state", tmp_path / "anew")

    change(tmp_path / "cut", "DELETE FROM audit WHERE number > 2")
    (tmp_path / "cut" / HEAD).write_text(f"{entries[1].head}\n")
    assert audited(tmp_path / "cut", capsys)[0] == 0, "nothing in the folder says that there was more"
    code, said = audited(tmp_path / "cut", capsys, *noted)
    assert (code, "entry 4, which --known names, is missing; the last is 2" in said) == (7, True)

    rewritten(tmp_path / "anew", lambda e: AuditEntry(**(vars(e) | {"actor": "eve"})) if e.number == 2 else e)
    assert audited(tmp_path / "anew", capsys)[0] == 0
    code, said = audited(tmp_path / "anew", capsys, *noted)
    assert (code, "entry 4 or one before it is another one than --known says" in said) == (7, True)
    assert audited(tmp_path / "anew", capsys, "--known", "4:nonsense")[0] == 2


def test_a_server_that_starts_on_a_log_that_was_cut_off_writes_that_down(tmp_path: Path) -> None:
    entries = filled(tmp_path / "state")
    change(tmp_path / "state", "DELETE FROM audit WHERE number > 4")
    with Store(tmp_path / "state") as store:
        ((number, action, detail),) = rows(store, "SELECT number, action, detail FROM audit WHERE number > 4")
        assert (number, action) == (5, "cut")
        assert json.loads(str(detail)) == {"expected": str(entries[-1].head), "found": 4}


def test_entries_are_printed_for_people_and_for_programs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Store(tmp_path / "state") as store:
        reason = "\x1b]0;owned\x07 enough\nfor today"
        store.audit.record(ADA, Action.STOPPED, "tiny-1", reason=reason)
        for options in ((), ("--json",)):  # while the server runs
            capsys.readouterr()
            with pytest.raises(SystemExit):
                main(["server", "audit", "--state", str(tmp_path / "state"), *options])
            out = capsys.readouterr().out
            if options:
                stopped = json.loads(out.splitlines()[1])
                assert stopped["detail"] == {"reason": reason}
                told = (stopped["actor"], stopped["action"], stopped["subject"])
                assert told == ("ada", "stopped", "tiny-1")
            else:
                assert "ada (submitter)  stopped  tiny-1" in out
                assert all(mark.isprintable() or mark == "\n" for mark in out)
                assert len(out.splitlines()) == 4  # two of entries, two of the last one's digest


def test_there_is_no_log_where_there_is_no_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = audited(tmp_path, capsys)
    assert (code, "is not there; give --state" in said) == (7, True)
    assert list(tmp_path.iterdir()) == []
