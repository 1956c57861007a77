"""A run's progress as lines of its log in the store, and what operators want of it in the daemon's own."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from fedpeft.ledger.records import Baseline, ClientOutcome, Finished, Round, Started
from fedpeft.reporting.event_lines import trouble_line
from fedpeft.reporting.summary import Summary

LOG = logging.getLogger("fedpeft.server")


class LoggedProgress:
    """Writes what happens through `say`, one JSON object each; rounds are written with their commit.

    Args:
        run: the server's name for the run.
        say: takes a line, durably.
        begun: the run was begun before and its first row is written already.
        refused: told whose update was refused, and why.
        secret_cohort: who takes part is secret: what would tell it is in the daemon's own log alone.
    """

    def __init__(
        self,
        run: str,
        say: Callable[[str], None],
        *,
        begun: bool,
        refused: Callable[[str, str], None],
        secret_cohort: bool,
    ) -> None:
        self._run, self._say, self._begun, self._refused = run, say, begun, refused
        self._secret_cohort = secret_cohort

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def setup(self, step: str) -> None:
        """Write the step."""
        self._event("step", step)

    def show_start(self, row: Started) -> None:
        """Write the row, once in a run's life."""
        if not self._begun:
            self._begun = True
            self._say(row.model_dump_json())

    def round_started(self, number: int, asked: int) -> None:
        """Write which round, and how many are asked."""
        told = "" if self._secret_cohort else f": {asked} agents are asked"
        self._event("step", f"round {number}{told}")

    def client_done(self, outcome: ClientOutcome) -> None:
        """Write a failure with its reason; of a secret cohort into the daemon's log, for its operator."""
        if outcome.status == "refused":
            self._refused(outcome.client, outcome.reason)
        line = trouble_line(outcome)
        if line is not None and self._secret_cohort:
            LOG.warning("run %s: %s", self._run, line, extra={"event": "trouble", "run": self._run})
        elif line is not None:
            self._event("trouble", line)

    def round_done(self, row: Round) -> None:
        """One line in the daemon's log; the row is in the run's since its commit.

        A private run's row names no clients, and neither does the line.
        """
        counted = sum(outcome.status == "folded" for outcome in row.outcomes)
        facts = {
            "event": "round",
            "run": self._run,
            "round": row.round,
            "asked": len(row.outcomes),
            "counted": counted,
            "bytes_up": sum(outcome.bytes_up for outcome in row.outcomes),
            "bytes_down": sum(outcome.bytes_down for outcome in row.outcomes),
            "seconds": round(row.wall_s, 3),
            "epsilon": row.epsilon,
        }
        told = f": {counted} of {len(row.outcomes)} counted, {row.wall_s:.1f} s" if row.outcomes else ""
        LOG.info("run %s: round %d%s", self._run, row.round, told, extra=facts)

    def baseline_progress(self, name: str, done: int, total: int) -> None:
        """Nothing."""

    def baseline_done(self, row: Baseline) -> None:
        """Write the row."""
        self._say(row.model_dump_json())

    def show_end(self, row: Finished) -> None:
        """Write the row."""
        self._say(row.model_dump_json())

    def note(self, text: str) -> None:
        """Write the note."""
        self._event("note", text)

    def result(self, summary: Summary, paths: Mapping[str, Path], snippet: str) -> None:
        """Nothing: people pull it."""

    def _event(self, kind: str, text: str) -> None:
        self._say(event_line(kind, text))


def event_line(kind: str, text: str) -> str:
    """A line of the log that is no row."""
    return json.dumps({"event": kind, "text": text})
