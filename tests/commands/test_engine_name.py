"""An engine that there is not is refused before a folder is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands.calling import exit_code


def test_no_folder_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["simulate", "--out", str(tmp_path / "run"), "--engine", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
