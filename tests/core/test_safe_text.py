"""Names and texts of others in a log or on a terminal: one line each, and nothing that acts."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.runtime.safe_text import one_line, replace_unprintable
from fedpeft.runtime.telemetry import LogFormat, set_up_log
from fedpeft_client.commands.client_command import client_status_command
from fedpeft_client.status import STATUS_FILE, AgentStatusFile

HOSTILE = "run-1\n2030-01-01 00:00:00 WARNING all is well\r\x1b[2J\x9b31m\u202etxt.exe\u2028end\x07\x00"


@given(st.text())
def test_one_line_is_one_line_that_can_be_printed(text: str) -> None:
    line = one_line(text)
    assert line.isprintable()
    assert line.splitlines() in ([], [line])
    assert one_line(line) == line
    assert replace_unprintable(line) == line


def test_words_stay_as_they_are() -> None:
    assert one_line("  Straße:  été\n12 µm ") == "Straße: été 12 µm"
    assert replace_unprintable("a  b\tc") == "a  b\N{REPLACEMENT CHARACTER}c"


@pytest.mark.parametrize("how", ["text", "json"])
def test_no_text_of_others_makes_a_line_of_a_log(how: LogFormat) -> None:
    out, logger = io.StringIO(), logging.getLogger("fedpeft.client")
    parent = logging.getLogger("fedpeft")
    kept = (parent.handlers[:], parent.level, parent.propagate)
    try:
        set_up_log("info", how, out=out)
        logger.info("the server says of run %s: %s", HOSTILE, HOSTILE, extra={"run": HOSTILE})
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            logger.exception("it failed with %s", HOSTILE)
    finally:
        parent.handlers[:], parent.level, parent.propagate = kept
    said = out.getvalue()
    lines = said.split("\n")
    assert not [mark for mark in said if not mark.isprintable() and mark != "\n"]
    begun = [line for line in lines if line and not line.startswith("  ")]
    assert len(begun) == 2, "a text of others began a line"
    if how == "json":
        assert json.loads(begun[0])["run"] == HOSTILE, "programs get the text as it came"


def test_what_a_server_said_is_shown_without_its_escapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = AgentStatusFile(tmp_path / STATUS_FILE, name="site-a", server="host:1")
    status.record_notice(HOSTILE)
    client_status_command(tmp_path, "", as_json=False)
    shown = capsys.readouterr().out
    assert "all is well" in shown
    assert not [mark for mark in shown if not mark.isprintable() and mark != "\n"]
    assert not [line for line in shown.splitlines() if line.startswith("2030")]
