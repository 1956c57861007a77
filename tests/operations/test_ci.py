"""`.ci/run`: what tests use of Debian's is installed where that can be, and the tests run in any case."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".ci" / "run"
TOOLS = ("bash", "dirname", "grep", "timeout", "env", "cat", "sleep")


def run(folder: Path, **programs: str) -> tuple[str, list[str]]:
    """What the script says on standard error, and which programs it called.

    Args:
        programs: shell scripts by name, `_` for `-`; beside these there are a few of the system's only.
    """
    tools, calls = folder / "bin", folder / "calls"
    tools.mkdir()
    (folder / ".ci").mkdir()
    shutil.copy(SCRIPT, folder / ".ci" / "run")
    for name in TOOLS:
        (tools / name).symlink_to(str(shutil.which(name)))
    for name, body in {"make": "", **programs}.items():
        path = tools / name.replace("_", "-")
        path.write_text(f'#!{shutil.which("bash")}\necho "{path.name} $*" >> {calls}\n{body}\n')
        path.chmod(0o755)
    done = subprocess.run(
        ["bash", str(folder / ".ci" / "run")],
        env={"PATH": str(tools), "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, calls.read_text().splitlines()


MISSING, ROOT, SOMEBODY = "exit 1", "echo 0", "echo 1000"
INSTALL = "apt-get install -y --no-install-recommends postgresql"


def test_what_is_missing_is_installed_and_then_the_tests_run(tmp_path: Path) -> None:
    said, called = run(tmp_path, dpkg_query=MISSING, id=ROOT, apt_get="")
    assert [call for call in called if call.startswith(("apt-get", "make"))] == [
        "apt-get update",
        INSTALL,
        "make test",
    ]
    assert said == ""


def test_what_is_there_is_let_alone(tmp_path: Path) -> None:
    said, called = run(tmp_path, dpkg_query="echo install ok installed", id=ROOT, apt_get="")
    assert not any(call.startswith("apt-get") for call in called)
    assert called[-1] == "make test"
    assert said == ""


@pytest.mark.parametrize(
    ("programs", "says"),
    [
        ({"id": SOMEBODY, "apt_get": ""}, "this is not root"),
        ({"id": ROOT}, "there is no apt-get here"),
        ({"id": ROOT, "apt_get": "exit 100"}, "apt-get could not install them"),
    ],
)
def test_without_it_the_tests_run_all_the_same_and_it_is_said_loudly(
    tmp_path: Path, programs: dict[str, str], says: str
) -> None:
    said, called = run(tmp_path, dpkg_query=MISSING, **programs)
    assert says in said
    assert "tests that need postgresql are SKIPPED" in said
    assert called[-1] == "make test"
    assert not any(call == INSTALL for call in called)
