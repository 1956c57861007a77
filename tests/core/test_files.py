"""Whole or not there: what is left when a write fails half way."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fedpeft.errors import RunExistsError, StorageError
from fedpeft.runtime.files import append_line, folder_atomically, remove_partial, storage, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_a_process(
    code: str, *arguments: str, prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_file_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    for content in (b"", b"old", b"new content"):
        write_atomically(file, content)
        assert file.read_bytes() == content
    assert names(tmp_path) == ["a.bin"]
    assert file.stat().st_mode & 0o777 == 0o644


# A limit on file sizes makes the kernel refuse the bytes beyond it: a write that fails in the middle.
FAILS_IN_THE_MIDDLE = f"""
    import resource, sys
    from pathlib import Path
    from fedpeft.errors import StorageError
    from fedpeft.runtime.files import folder_atomically, write_atomically
    path, how = Path(sys.argv[1]), sys.argv[2]
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, {resource.RLIM_INFINITY}))
    try:
        if how == "file":
            write_atomically(path, b"x" * 10000)
        else:
            with folder_atomically(path) as fresh:
                (fresh / "one").write_bytes(b"fine")
                (fresh / "two").write_bytes(b"x" * 10000)
    except StorageError as error:
        assert str(path) in str(error), error
        sys.exit(42)
"""


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    file.write_bytes(b"old")
    result = in_a_process(FAILS_IN_THE_MIDDLE, str(file), "file")
    assert result.returncode == 42, result.stderr
    assert file.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_folder_that_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "old").write_bytes(b"old")
    result = in_a_process(FAILS_IN_THE_MIDDLE, str(folder), "folder")
    assert result.returncode == 42, result.stderr
    assert names(folder) == ["old"]
    assert names(tmp_path) == ["adapter"]


DISK_FULL = """
    import subprocess, sys
    from pathlib import Path
    from fedpeft.errors import StorageError
    from fedpeft.runtime.files import write_atomically
    disk = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=True)
    write_atomically(disk / "state", b"old")
    try:
        write_atomically(disk / "state", b"x" * 200_000)
    except StorageError as error:
        assert "no disk space" in str(error), error
        assert (disk / "state").read_bytes() == b"old"
        assert [path.name for path in disk.iterdir()] == ["state"]
        sys.exit(42)
"""


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """In a mount namespace of its own, so that the small disk is gone with the process."""
    for prefix in (("unshare", "--mount"), ("unshare", "--user", "--map-root-user", "--mount")):
        able = [*prefix, "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
        if shutil.which("unshare") and subprocess.run(able, capture_output=True, check=False).returncode == 0:
            result = in_a_process(DISK_FULL, str(tmp_path), prefix=prefix)
            assert result.returncode == 42, result.stderr
            return
    pytest.skip("needs the right to mount a small disk (root, or user namespaces)")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_line_for_a_full_disk_is_an_error() -> None:
    with pytest.raises(StorageError, match="no disk space is left"):
        append_line(Path("/dev/full"), "row")


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none" / "a", tmp_path / "file" / "a"):
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="check the path"):
            write_atomically(path, b"x")


def test_a_folder_is_put_in_place_whole(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    for content in ("one", "two"):
        with folder_atomically(target) as fresh:
            (fresh / content).write_text(content)
            (fresh / "deep").mkdir()
            (fresh / "deep" / "x").write_text("x")
        assert names(target) == sorted(["deep", content])
        assert names(tmp_path) == ["adapter"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, RunExistsError])
def test_an_exception_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "adapter"
    target.mkdir()

    def fail() -> None:
        with folder_atomically(target) as fresh:
            (fresh / "half").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == ["adapter"]
    assert names(target) == []


def test_lines_are_appended(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    append_line(file, "one")
    append_line(file, "zwölf")
    assert file.read_bytes() == "one\nzwölf\n".encode()


def test_what_a_crash_left_is_removed(tmp_path: Path) -> None:
    code = """
        import os, sys
        from pathlib import Path
        from fedpeft.runtime.files import folder_atomically
        with folder_atomically(Path(sys.argv[1]) / "adapter") as fresh:
            (fresh / "half").write_text("half")
            os._exit(9)
    """
    assert in_a_process(code, str(tmp_path)).returncode == 9
    (tmp_path / "keep").touch()
    assert len(names(tmp_path)) == 2
    remove_partial(tmp_path)
    assert names(tmp_path) == ["keep"]


def test_our_errors_pass_through_and_others_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunExistsError), storage(tmp_path):
        raise RunExistsError("x")
    with pytest.raises(StorageError, match="Permission denied"), storage(tmp_path):
        raise PermissionError(13, os.strerror(13))
