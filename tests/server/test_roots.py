"""What of the server's files a submitter's run file may name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpeft.config.run_file import build_run
from fedpeft.config.sections import RunConfig
from fedpeft.errors import RunFileError, UsageError
from fedpeft_server.ops.server_settings import read_settings
from fedpeft_server.runs.roots import Roots
from fedpeft_server.runs.supervisor import Supervisor
from fedpeft_server.store import Rules, Store
from tests.server.in_memory_grid import standins


def run_of(**parts: Any) -> RunConfig:
    parts["data"] = {"train": "x", "prompt": "{q}", "answer": "{a}"} | parts.get("data", {})
    return build_run({"run": {"name": "t", "rounds": 1}, **parts}, source="test")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("rows/test.jsonl", "models/base/config.json", "secret/rows.jsonl", "rows-too/a.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "rows" / "link").symlink_to(tmp_path / "secret")
    return tmp_path


def named(place: Path, what: str) -> dict[str, Any]:
    key, _, path = what.partition("=")
    path = path.replace("PLACE", str(place))
    return {
        "test": {"data": {"test": path}},
        "model": {"model": {"path": path}},
        "plug": {"evaluation": {"plug_into": path}},
    }[key]


OUTSIDE = (
    "test=PLACE/secret/rows.jsonl",
    "test=PLACE/rows/../secret/rows.jsonl",
    "test=PLACE/rows/*/../../secret/*.jsonl",
    "test=PLACE/rows/link/rows.jsonl",
    "test=PLACE/rows/link/*.jsonl",
    "test=PLACE/rows-too/a.jsonl",
    "test=PLACE/*/rows.jsonl",
    "test=/etc/passwd",
    "test=**/*.json",
    "test=state/blobs/ab/abcd",
    "test=datasets:pandas",
    "test=datasets:other/set",
    "test=~/rows.jsonl",
    "model=PLACE/secret",
    "model=package:os/x",
    "model=./models",
    "model=own:",
    "model=owner/model",
    "plug=PLACE/secret",
    "plug=owner/model",
)
BELOW = (
    "test=PLACE/rows/test.jsonl",
    "test=PLACE/rows",
    "test=PLACE/rows/*.jsonl",
    "test=embedded",
    "test=datasets:owner/set",
    "test=datasets:owner/set/config:test",
    "model=PLACE/models/base",
    "model=embedded",
    "model=hub:owner/model",
    "plug=PLACE/models/base",
)


@pytest.mark.parametrize("what", OUTSIDE)
def test_what_lies_elsewhere_is_refused_and_nothing_is_said_of_it(what: str, place: Path) -> None:
    roots = Roots((str(place / "rows"), str(place / "models"), "datasets:owner/set"))
    with pytest.raises(RunFileError, match="is not among what submitters may name") as refused:
        roots.refuse(run_of(**named(place, what)))
    missing = RunFileError("run file", refused.value.problems)
    assert "exist" not in str(missing)


@pytest.mark.parametrize("what", BELOW)
def test_what_lies_below_a_root_is_taken(what: str, place: Path) -> None:
    roots = Roots((str(place / "rows"), str(place / "models"), "datasets:owner/set"))
    roots.refuse(run_of(**named(place, what)))


def test_without_roots_a_submitter_names_no_file(place: Path) -> None:
    free = {"test=embedded", "model=embedded", "model=hub:owner/model"}
    for what in (*OUTSIDE, *BELOW):
        run = run_of(**named(place, what))
        if what in free:
            Roots().refuse(run)
        else:
            with pytest.raises(RunFileError):
                Roots().refuse(run)


def test_whether_a_folder_has_the_name_of_a_model_is_not_told(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One answer, whether it is there, elsewhere or nowhere."""
    monkeypatch.chdir(place)
    said = []
    for path in ("models/base", "models/none"):
        with pytest.raises(RunFileError) as refused:
            Roots().refuse(run_of(model={"path": path}))
        said.append(str(refused.value).replace(path, "PATH"))
    assert said[0] == said[1]
    assert said[0].endswith("a base model of the hub is named 'hub:PATH' here")


@pytest.mark.parametrize("root", ["state", ".", "state/runs", "link", "federation", "federation/server"])
def test_a_root_that_holds_the_servers_own_files_is_refused(tmp_path: Path, root: str) -> None:
    (tmp_path / "state" / "runs").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "state")
    config = tmp_path / "server.toml"
    keys = '[tls]\nkeys = "federation/server"\nauthority = "federation/ca"\n'
    config.write_text(f'state = "state"\nroots = ["{root}"]\n{keys}')
    with pytest.raises(UsageError, match="name folders that hold data and models alone"):
        read_settings(config, {})
    config.write_text(f'state = "state"\nroots = ["rows", "datasets:owner/set"]\n{keys}')
    assert read_settings(config, {}).roots[0].endswith("rows")


def test_a_daemon_binds_submitters_and_not_its_admins(place: Path, tmp_path: Path) -> None:
    run = run_of(data={"test": str(place / "secret" / "rows.jsonl"), "partitioner": {"kind": "files"}})
    with Store(tmp_path / "state") as store:
        supervisor = Supervisor(store, standins(store, []), roots=Roots())
        with pytest.raises(RunFileError, match=r"data\.test"):
            supervisor.submit(run, Rules(), submission="a", submitter="mallory")
        with pytest.raises(UsageError, match="agents"):  # the next thing that is looked at
            supervisor.submit(run, Rules(), submission="b", submitter="root", role="admin")
        assert store.runs.list() == []


def test_roots_of_a_file_are_relative_to_it(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text('insecure = true\nroots = ["rows", "/srv/models", "datasets:owner/set"]\n')
    assert read_settings(file, {}).roots == (str(tmp_path / "rows"), "/srv/models", "datasets:owner/set")
    assert read_settings(None, {"insecure": True}).roots == ()
