"""A run's progress as lines of its log in the store."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from fedpeft.records import Baseline, ClientOutcome, Finished, Round, Started
from fedpeft.reporting.lines import trouble_line
from fedpeft.reporting.summary import Summary


class LoggedProgress:
    """Writes what happens through `say`, one JSON object each; rounds are written with their commit.

    Args:
        say: takes a line, durably.
        begun: the run was begun before and its first row is written already.
    """

    def __init__(self, say: Callable[[str], None], *, begun: bool) -> None:
        self._say, self._begun = say, begun

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def setup(self, step: str) -> None:
        """Write the step."""
        self._event("step", step)

    def started(self, row: Started) -> None:
        """Write the row, once in a run's life."""
        if not self._begun:
            self._begun = True
            self._say(row.model_dump_json())

    def round_started(self, number: int, asked: int) -> None:
        """Write which round, and how many are asked."""
        self._event("step", f"round {number}: {asked} agents are asked")

    def client_done(self, outcome: ClientOutcome) -> None:
        """Write a failure with its reason."""
        line = trouble_line(outcome)
        if line is not None:
            self._event("trouble", line)

    def round_done(self, row: Round) -> None:
        """Nothing: the row is in the log since its commit."""

    def baseline_progress(self, name: str, done: int, total: int) -> None:
        """Nothing."""

    def baseline_done(self, row: Baseline) -> None:
        """Write the row."""
        self._say(row.model_dump_json())

    def finished(self, row: Finished) -> None:
        """Write the row."""
        self._say(row.model_dump_json())

    def note(self, text: str) -> None:
        """Write the note."""
        self._event("note", text)

    def result(self, summary: Summary, paths: Mapping[str, Path], snippet: str) -> None:
        """Nothing: people pull it."""

    def _event(self, kind: str, text: str) -> None:
        self._say(json.dumps({"event": kind, "text": text}))
