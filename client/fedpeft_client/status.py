"""What an agent is doing, in a file that `fedpeft client status` reads."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.errors import StateError
from fedpeft.runtime.files import storage
from fedpeft_client.policy.usage import RunUsage, Usage

if TYPE_CHECKING:
    from fedpeft_client.policy.device_accountant import Accountant

STATUS_FILE = "status.json"
_EVERY_S = 1.0


class AgentStatusFile:
    """The file is for people: written about once a second, not flushed, and never the source of anything."""

    def __init__(self, path: Path, *, name: str, server: str) -> None:
        self._path = path
        self._fixed = {"agent": name, "server": server, "pid": os.getpid()}
        self.usage = Usage()
        self.accountant: Accountant | None = None
        self.state = "starting"
        self.doing = ""
        self.base_digest = ""
        self.loads = 0  # of the base model, since the agent was started
        self.certificate_ends: float | None = None
        self.last_error = ""
        self.last_refusal = ""
        self.notice = ""  # what the server said last
        self._at: dict[str, float] = {}  # when these three were, by name
        self._since = time.time()
        self._written = 0.0

    def now(self, state: str) -> None:
        """The connection's state: connecting, connected, stopped."""
        if state != self.state:
            self.state, self._since = state, time.time()
        self.write_if_due(at_once=True)

    def working(self, kind: str, round_: int) -> None:
        """A task is under way."""
        self.doing = f"{kind}, round {round_}"
        self.write_if_due(at_once=True)

    def idle(self) -> None:
        """No task is."""
        self.doing = ""
        self.write_if_due(at_once=True)

    def record_failure(self, line: str) -> None:
        """Something went wrong."""
        self.last_error, self._at["last_error"] = line, time.time()
        self.write_if_due(at_once=True)

    def record_notice(self, text: str) -> None:
        """The server had something to say."""
        self.notice, self._at["notice"] = text, time.time()
        self.write_if_due(at_once=True)

    def record_refusal(self, reason: str) -> None:
        """A task was refused."""
        self.last_refusal, self._at["last_refusal"] = reason, time.time()
        self.write_if_due(at_once=True)

    def write_if_due(self, *, at_once: bool = False) -> None:
        """Write the file, unless that was just done."""
        if at_once or time.monotonic() - self._written > _EVERY_S:
            self._written = time.monotonic()
            fresh = self._path.with_name(f".{self._path.name}")
            with contextlib.suppress(OSError):  # a full disk shall not end what it only tells of
                fresh.write_text(json.dumps(self._table(), indent=1) + "\n")
                os.replace(fresh, self._path)

    @property
    def epsilon(self) -> float:
        """What all runs on these rows have cost, by the device's own account at the owner's delta."""
        return 0.0 if self.accountant is None else self.accountant.total_epsilon

    def _table(self) -> dict[str, Any]:
        usage = self.usage
        return {
            **self._fixed,
            "state": self.state,
            "since": self._since,
            "written": time.time(),
            "doing": self.doing,
            "results": usage.results,
            "refusals": usage.refusals,
            "failures": usage.failures,
            "bytes_up": usage.bytes_up,
            "bytes_down": usage.bytes_down,
            "bytes_today": usage.bytes_today,
            "epsilon": self.epsilon,
            "delta": 0.0 if self.accountant is None else self.accountant.delta,
            "runs": [self._run_table(run) for run in usage.runs.values()],
            "base_digest": self.base_digest,
            "loads": self.loads,
            "certificate_ends": self.certificate_ends,
            "last_error": self.last_error,
            "last_refusal": self.last_refusal,
            "notice": self.notice,
            "at": self._at,
        }

    def _run_table(self, run: RunUsage) -> dict[str, Any]:
        """A run as its owner sees it, with its costs by the device's own ledger; None: no promise."""
        table: dict[str, Any] = run.model_dump(exclude={"rows", "trained"})
        account = None if self.accountant is None else self.accountant.ledger.runs.get(run.digest)
        paid: dict[str, Any] = {"kind": "", "epsilon": None, "paid_round": 0, "answered_round": 0}
        if account is not None:
            paid = {
                "kind": account.kind,
                "epsilon": account.epsilon,
                "paid_round": account.round,
                "answered_round": account.answered,
            }
        return table | paid


def read_status(home: Path) -> dict[str, Any]:
    """The status of an agent, with whether it is running.

    Raises:
        StateError: no agent was ever started with that folder.
    """
    path = home / STATUS_FILE
    if not path.is_file():
        raise StateError(f"{home}: no agent has run with this folder; give --home or --name as at its start")
    with storage(path):
        table: dict[str, Any] = json.loads(path.read_text())
    table["running"] = table["state"] != "stopped" and _alive(int(table["pid"]))
    return table


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
