"""What `fedpeft provision` does beside a server, in that server's audit log."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpeft.cli import main
from fedpeft.credentials.actions import ACTIONS_FILE
from fedpeft_server.ops.authority_actions import AuthorityActions
from fedpeft_server.store import Store
from fedpeft_server.store.audit_log import AuditEntry, find_faults, read_entries


def provision(folder: Path, *words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["provision", str(folder), *words, "--json"])
    assert ended.value.code == 0


def entries(store: Store) -> list[AuditEntry]:
    found = list(read_entries(store.database))
    assert find_faults(iter(found), [])[0] == []
    return found


def told(store: Store) -> list[tuple[str, str, str]]:
    return [(each.role, each.action, each.subject) for each in entries(store)]


def test_what_provision_does_is_taken_in_once(tmp_path: Path) -> None:
    folder = tmp_path / "federation"
    provision(folder, "--host", "127.0.0.1", "--agent", "north")
    with Store(tmp_path / "state") as store:
        AuthorityActions(folder / "ca", store.audit).take_in()
        provision(folder, "--submitter", "ada", "--tokens")
        provision(folder, "--revoke", "north")
        for _ in range(2):  # as after a restart of the server
            actions = AuthorityActions(folder / "ca", store.audit)
            actions.take_in()
            actions.take_in()
        assert told(store) == [
            ("server", "began", ""),
            ("authority", "created", ""),
            ("authority", "issued", "north"),
            ("authority", "invited", "ada"),
            ("authority", "revoked", "north"),
        ]
    assert (folder / "ca" / ACTIONS_FILE).stat().st_mode & 0o777 == 0o600


def test_lines_that_are_missing_or_none_are_recorded(tmp_path: Path) -> None:
    folder = tmp_path / "federation"
    provision(folder, "--host", "127.0.0.1", "--agent", "north", "--agent", "south")
    lines = folder / "ca" / ACTIONS_FILE
    with Store(tmp_path / "state") as store:
        AuthorityActions(None, store.audit).take_in()
        AuthorityActions(folder / "ca", store.audit).take_in()
        lines.write_text(lines.read_text().splitlines()[0] + "\n")
        AuthorityActions(folder / "ca", store.audit).take_in()
        assert told(store)[-1] == ("server", "cut", ACTIONS_FILE)
        lines.write_text("\n".join(["{}"] * 4) + "\n")
        AuthorityActions(folder / "ca", store.audit).take_in()
        assert told(store)[-1] == ("authority", "cut", ACTIONS_FILE)
