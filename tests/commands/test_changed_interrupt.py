"""Ctrl-C whose exception a library, or Python itself, changes into another on its way."""

from __future__ import annotations

import os
import signal

import pytest

from fedpeft.cli import end_cleanly
from fedpeft.runtime.console import INTERRUPTED, clean_interrupts


def interrupted_import() -> int:
    """As where a class is being made: Python 3.11 raises a RuntimeError from what was raised there."""
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt as error:
        raise RuntimeError("Error calling __set_name__") from error
    return 0


def broken() -> int:
    raise RuntimeError("a fault of ours")


def test_an_interrupt_that_became_an_error_ends_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    with clean_interrupts():
        assert end_cleanly(interrupted_import) == INTERRUPTED
    assert capsys.readouterr().err.startswith("interrupted")


def test_another_error_stays_what_it_is() -> None:
    with clean_interrupts(), pytest.raises(RuntimeError, match="a fault of ours"):
        end_cleanly(broken)
