"""A run's model in a process of its own, which is there while something is evaluated or exported.

Rounds are held here, by a process that holds updates, sums and the state, and no model. What comes after the
last round is done there, by the code that holds whole runs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from fedpeft.config.run_file import run_json
from fedpeft.config.sections import RunConfig
from fedpeft.errors import UsageError
from fedpeft.flower.server_app import RoundServer
from fedpeft.ledger import RunFolder
from fedpeft.ledger.records import Evaluation, Started, parse_row
from fedpeft.reporting.event_lines import promise_notes
from fedpeft.runtime.files import storage
from fedpeft.runtime.frames import Frame
from fedpeft.seedspace.host_state import HostState
from fedpeft.seedspace.layout import CounterStream
from fedpeft.spaces import ServerSpace, space_options
from fedpeft.spaces.adapter_delta import AdapterDelta
from fedpeft.spaces.seed_options import SeedScalarsOptions, largest_amount
from fedpeft.spaces.seed_rules import SeedRules
from fedpeft.stages import Stage, build_stages
from fedpeft.transport.roster import Roster
from fedpeft.updates.update import Arrays, freeze_arrays
from fedpeft_server.runs.control import Control
from fedpeft_server.runs.journal_lines import LoggedProgress
from fedpeft_server.runs.model_host import HeldElsewhereError, Hold, RunStorage
from fedpeft_server.runs.model_process_pool import ModelProcess, ModelProcessPool
from fedpeft_server.store import StoredRun

EXPORT_S = 600.0  # for the adapter of a run that was stopped; a second stop ends it earlier


@dataclass(frozen=True)
class RemoteRunView:
    """A run without its model; see `fedpeft.flower.server_app.RunView`.

    Attributes:
        started: the run's first row, but for who takes part.
        scores: whether there are rows to evaluate.
    """

    run: RunConfig
    run_digest: str
    space: ServerSpace
    stages: tuple[Stage, ...]
    state: Arrays
    base_digest: str
    clients_here: int
    started: Started
    scores: bool
    start: Arrays
    start_bytes: bytes

    def initial_state(self) -> Arrays:
        """See `RunView`."""
        return self.state

    def base_of(self, client: str) -> str:
        """All clients hold one base."""
        return self.base_digest

    def get_frozen_factors(self) -> Arrays:
        """Of no run that is held so."""
        return {}

    def own_states(self, state: Arrays, memories: Arrays, nodes: Any) -> dict[str, Arrays]:
        """No client keeps anything to itself.

        Raises:
            UsageError: always.
        """
        raise UsageError("runs whose clients keep parameters to themselves are held beside their model")


class SubprocessModelHost:
    """See `ModelHost`."""

    def __init__(self, stored: StoredRun, room: ModelProcessPool, control: Control) -> None:
        self._stored, self._room, self._control = stored, room, control
        self._process: ModelProcess | None = None
        self._described: RemoteRunView | None = None

    def hold(self, book: RunStorage, progress: LoggedProgress, hold: Hold) -> None:
        """Rounds here, the rest there."""
        began = time.monotonic()
        with book.open() as folder:
            finished = folder.read_end() is not None
            if not finished:
                self._rounds(folder, progress, hold)
        if not finished:
            self._write("finish", book, spent_s=time.monotonic() - began)
            self._end()

    def export(self, book: RunStorage) -> None:
        """See `ModelHost`."""
        if self._described is not None:
            self._write("export", book, limit_s=EXPORT_S)

    def snapshot(self, book: RunStorage, path: Path) -> None:
        """See `ModelHost`."""
        self._write("snapshot", book, to=str(path))

    def release(self) -> None:
        """See `ModelHost`."""
        self._end()
        self._described = None

    def _rounds(self, folder: RunFolder, progress: LoggedProgress, hold: Hold) -> None:
        last = folder.latest()
        folder.realign(last)
        run = self._stored.run
        if last is not None and last.round >= run.run.rounds:
            return
        progress.setup("loading rows and model")
        held = self._described = self._described or self._describe()
        if not held.scores:
            self._end()

        def ready(roster: Roster) -> None:
            _announce(held, folder, progress, roster)

        hold(
            RoundServer(
                resident=held,
                journal=folder,
                observer=progress,
                evaluate=self._evaluate,
                step=progress.setup,
                ready=ready,
                budget=folder,
                history=folder,
            ),
            last,
        )

    def _describe(self) -> RemoteRunView:
        with storage(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(prefix="fedpeft-") as place:
            weights = Path(place) / "weights.npy"
            answer = self._ask("describe", {"run": run_json(self._stored.run), "weights": str(weights)})
            told = answer.header
            if not told["plain"]:
                raise HeldElsewhereError
            # A map of a file that soon has no name: its pages are the system's to drop, and nobody tidies up.
            flat = np.load(weights, mmap_mode="r") if told["shapes"] else np.zeros(0, dtype=np.float32)
        started = parse_row(told["started"])
        if not isinstance(started, Started):
            raise HeldElsewhereError
        return RemoteRunView(
            run=self._stored.run,
            run_digest=self._stored.digest,
            space=_space(self._stored.run, _split(flat, told["shapes"])),
            stages=build_stages(self._stored.run),
            state=freeze_arrays(load(answer.parts["state"])),
            base_digest=told["base_digest"],
            clients_here=told["clients_here"],
            started=started,
            scores=told["scores"],
            start={},
            start_bytes=answer.parts["start"],
        )

    def _evaluate(self, state: Arrays) -> Evaluation | None:
        if self._described is None or not self._described.scores:
            return None
        arrays = {name: np.ascontiguousarray(array) for name, array in state.items()}
        order = {"run": run_json(self._stored.run)}
        found = self._ask("evaluate", order, {"state": save(arrays)}).header["evaluation"]
        return None if found is None else Evaluation.model_validate_json(found)

    def _write(self, what: str, book: RunStorage, *, limit_s: float | None = None, **more: Any) -> None:
        where = book.reference
        place = {"database": where.url, "epoch": where.epoch, "blobs": str(where.blobs)}
        order = {"run": run_json(book.run), "id": book.id, "folder": str(book.path), **place, **more}
        self._ask(what, order, limit_s=limit_s)

    def _ask(
        self,
        what: str,
        order: Mapping[str, Any],
        parts: Mapping[str, bytes] | None = None,
        *,
        limit_s: float | None = None,
    ) -> Frame:
        """As `ModelProcess.ask`; a person's stop of the run ends it."""
        if self._process is None:
            self._process = self._room.take()
        with self._control.kill_on_stop(self._process.kill):
            return self._process.ask(what, order, parts, limit_s=limit_s)

    def _end(self) -> None:
        if self._process is not None:
            self._room.end(self._process)
        self._process = None


def _space(run: RunConfig, weights: dict[str, NDArray[np.float32]]) -> ServerSpace:
    """The run's space for whoever counts."""
    options = space_options(run.space)
    if not isinstance(options, SeedScalarsOptions):
        return AdapterDelta()
    exponent, mode = options.exponent(run.training.lr), options.mode_of(run)
    state = HostState(CounterStream(run.run.seed), mode.num_seeds, exponent, weights)
    return SeedRules(mode, largest_amount(run, exponent), state.fingerprint)


def _split(flat: NDArray[np.float32], shapes: dict[str, list[int]]) -> dict[str, NDArray[np.float32]]:
    """Arrays that lie one after the other."""
    found, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64))
        found[name] = flat[start : start + size].reshape(shape)
        start += size
    return found


def _announce(held: RemoteRunView, folder: RunFolder, progress: LoggedProgress, roster: Roster) -> None:
    """Write the first row once, and tell people in any case."""
    row = folder.read_start()
    if row is None:
        clients = held.started.clients
        if set(roster.members) != set(clients):  # they have rows of their own
            hidden = held.run.privacy is not None
            clients = {name: 0 if hidden else roster.members[name].examples for name in roster.names}
        row = held.started.model_copy(update={"clients": clients})
        folder.append(row)
    progress.show_start(row)
    for note in promise_notes(row.privacy):
        progress.note(note)
