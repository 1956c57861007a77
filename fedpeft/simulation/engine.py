"""A run from its folder to its report: set up, hold the rounds, compare, export; wherever its clients are."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
import resource
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from fedpeft.attacks import refuse_attack
from fedpeft.config.run_file import load_run, run_toml
from fedpeft.config.run_plugins import plugins_of
from fedpeft.config.sections import DataSection, RunConfig
from fedpeft.errors import StateError, UsageError
from fedpeft.evaluation.metrics import METRICS, metrics_of
from fedpeft.flower.local_grid import LocalGrid
from fedpeft.flower.ray_engine import run_on_ray
from fedpeft.flower.server_app import Order, RoundServer, execute_rounds
from fedpeft.ledger import Checkpoint, RunFolder
from fedpeft.ledger.records import ClientOutcome, Finished, Promise, Round, Started
from fedpeft.ledger.run_folder import open_or_create
from fedpeft.ledger.run_place import PLUGGED
from fedpeft.models.base_model import load_base
from fedpeft.models.card import public_name, write_card, write_tokenizer
from fedpeft.models.comparison import bytes_of_copy, draw_token_rows, read_logits, refuse_difference
from fedpeft.models.coverage import coverage_notes
from fedpeft.models.device import available_memory, full_memory_refused, move, peak_memory
from fedpeft.models.export import adapter_digest, export_adapter, load_adapter
from fedpeft.models.starts import decomposition_of_model
from fedpeft.models.trainable import count_parameters
from fedpeft.participant.assembly import Admit, device_for
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.participant.loaded_run import LoadedRun, set_loaded_run
from fedpeft.planning.preflight import has_answers, refuse_problems, simulation_problems
from fedpeft.privacy.kinds import budget_of, event_of, kind_of
from fedpeft.privacy.noise_sources import refuse_seeded
from fedpeft.reporting.event_lines import attack_notes, promise_notes
from fedpeft.reporting.html import write_report
from fedpeft.reporting.plain import PlainProgress
from fedpeft.reporting.progress import Progress
from fedpeft.reporting.sinks import MetricSink, open_sink
from fedpeft.reporting.snippet import load_snippet
from fedpeft.reporting.summary import Summary, build_summary, summary_json
from fedpeft.runtime.files import folder_atomically, write_atomically
from fedpeft.runtime.randomness import derive_seed
from fedpeft.simulation.baselines import run_baselines
from fedpeft.simulation.offsite_scores import emulator_to_plug, offsite_scores, write_plugged
from fedpeft.simulation.parallel_scoring import TEST, Scorer, may_score, rows_of
from fedpeft.training.setting_notes import setting_notes
from fedpeft.transport.roster import Roster
from fedpeft.workers import Workers, open_workers

Engine = Callable[
    [RoundServer, Checkpoint | None, Workers], Checkpoint
]  # holds the rounds after a checkpoint
OWN_MODELS = (
    "every client keeps parameters to itself: scores are of each client's own model on its own held-out rows,"
    " and adapter/ holds only what clients share"
)
_PLUGIN = "plugin "
_VERSIONS = ("fedpeft", "flwr", "torch", "transformers", "peft", "numpy")


def load_alone(run: RunConfig, *, admit: Admit | None = None, data: DataSection | None = None) -> LoadedRun:
    """Load a run with all its clients as the only one of this process and of those forked from it.

    Args:
        admit: see `load_simulated_run`.
        data: where its rows lie; None: where the run says.
    """
    torch.set_num_threads(1)  # before any tensor is computed: worker processes are forked from here
    resident = load_simulated_run(run, admit=admit, data=data)
    set_loaded_run(resident)
    return resident


@dataclass(frozen=True)
class Deployment:
    """Where a run is held: all that differs between a simulation, Flower's nodes and a server with agents.

    Attributes:
        name: as the report calls it.
        hold: holds the rounds.
        load: loads the run into this process, as one that `fedpeft.participant.loaded_run.get_loaded_run`
        finds.
    """

    name: str
    hold: Engine
    load: Callable[[RunConfig], LoadedRun] = load_alone


@dataclass(frozen=True)
class RunResult:
    """A finished run: where it lies and what came out."""

    folder: Path
    summary: Summary
    snippet: str

    @property
    def paths(self) -> Mapping[str, Path]:
        """What a person looks for first."""
        return {"adapter": self.folder / "adapter", "report": self.folder / "report.html"}


def simulate(
    folder: RunFolder, *, workers: int, engine: str, progress: Progress, admit: Admit | None = None
) -> RunResult:
    """Run, or go on with, the run of an open folder.

    Args:
        folder: new (`RunFolder.create`) or begun (`RunFolder.resume`).
        workers: processes that train and evaluate; the result doesn't depend on it.
        engine: "local", or "ray" for Flower's simulation engine.
        admit: asked before the base model is loaded; refuses by raising.

    Raises:
        FedPEFTError: see `fedpeft.errors`. Every committed round stays, and the run can be resumed.
    """
    check_engine(engine)
    impossible = simulation_problems(folder.run)
    if impossible:
        raise UsageError(impossible[0])
    if engine == "ray" and folder.data != folder.run.data:
        raise UsageError("--engine ray reads rows where the run file says; put them there, or leave it out")
    if engine == "ray" and device_for(folder.run).type != "cpu":
        raise UsageError("--engine ray trains on the CPU; set model.device 'cpu', or leave the engine out")
    load = functools.partial(load_alone, admit=admit, data=folder.data)
    return execute_run(folder, Deployment(engine, ENGINES[engine], load), progress, workers=workers)


def check_engine(engine: str) -> None:
    """Refuse an engine that there is not.

    Raises:
        UsageError: with those that there are.
    """
    if engine not in ENGINES:
        raise UsageError(f"no engine is called {engine!r}; use one of {', '.join(ENGINES)}")


def execute_run(
    folder: RunFolder, venue: Deployment, progress: Progress, *, workers: int = 1, spent_s: float = 0.0
) -> RunResult:
    """Bring the run of an open folder to its end; one that is at its end already is left as it is.

    Args:
        spent_s: on the run by another process of the same attempt.

    Raises:
        FedPEFTError: see `fedpeft.errors`. Every committed round stays, and the run can be resumed.
    """
    if folder.read_end() is not None:
        progress.note(f"{folder.path} is finished already; nothing to do")
        return _result(folder)
    return _RunExecution(folder, venue, progress, spent_s).run(workers)


def serve(order: Order) -> None:
    """Run, or go on with, a run on the nodes of a grid that is there already; evaluate in this process.

    Raises:
        RunExistsError: the folder holds another run.
        FedPEFTError: as `simulate`. Every committed round stays: the same order again goes on from there.
    """
    run = load_run(order.run_file)
    refuse_problems(run, source=str(order.run_file))
    refuse_seeded(run)
    refuse_attack(run)
    out = order.out or Path("runs") / run.run.name

    def on_nodes(server: RoundServer, last: Checkpoint | None, pool: Workers) -> Checkpoint:
        deadline_s = run.federation.deadline_s if run.federation.clock is None else None
        return execute_rounds(server, order.grid, last, timeout_s=deadline_s)

    log = Console(force_terminal=False, highlight=False)  # what is printed goes to the Flower run's log
    with open_or_create(out, run) as folder, PlainProgress(log) as progress:
        finished = folder.read_end() is not None
        result = execute_run(folder, Deployment("flower", on_nodes), progress)
        if not finished:
            progress.result(result.summary, result.paths, result.snippet)


def _on_local_grid(server: RoundServer, last: Checkpoint | None, pool: Workers) -> Checkpoint:
    grid = LocalGrid(server.resident.clients_here, pool)
    return execute_rounds(server, grid, last, grid)


def _on_ray(server: RoundServer, last: Checkpoint | None, pool: Workers) -> Checkpoint:
    server.step("starting Flower's simulation engine")
    clients = server.resident.clients_here
    return run_on_ray(lambda grid: execute_rounds(server, grid, last), clients, pool.width)


ENGINES: dict[str, Engine] = {"local": _on_local_grid, "ray": _on_ray}


class _RunExecution:
    """One process's work on one run folder."""

    def __init__(self, folder: RunFolder, venue: Deployment, progress: Progress, spent_s: float) -> None:
        self._folder = folder
        self._run = folder.run
        self._venue = venue
        self._progress = progress
        self._began = time.monotonic() - spent_s
        refuse_other_plugins(folder)
        last = folder.latest()
        over = last is not None and last.round >= self._run.run.rounds
        progress.setup("loading the model to write adapter and report" if over else "loading rows and model")
        if not over:
            for note in setting_notes(self._run):
                progress.note(note)
        self._resident = venue.load(self._run)
        folder.bind_rows(self._resident.data.rows_digest)
        for note in () if over else self._resident.data.notes:
            progress.note(note)
        # Now: where clients work in this very process, the parameters will be somewhere else afterwards.
        self._start = self._resident.space.initial_state(self._resident.parameters)
        self._metrics = run_metrics(self._run)
        self._sinks: list[MetricSink] = []

    def run(self, workers: int) -> RunResult:
        last = self._folder.latest()
        self._folder.realign(last)
        with ExitStack() as stack:
            self._progress.setup("starting worker processes")
            pool = stack.enter_context(open_workers(self._width(workers)))
            self._sinks = [stack.enter_context(closing(sink)) for sink in self._open_sinks(last)]
            scorer = Scorer(self._resident, self._metrics, pool)
            final = self._rounds(scorer, pool, last)
            rounds = [row for row in self._folder.rows() if isinstance(row, Round)]
            if self._run.evaluation.baselines and self._resident.data.clients:
                self._baselines(scorer, rounds)
            elif self._run.evaluation.baselines:
                self._progress.note("no baselines: the clients' rows are not here")
            if self._run.evaluation.plug_into is not None:
                self._plug_in(final)
        self._finish(final, rounds)
        return _result(self._folder)

    def _width(self, workers: int) -> int:
        """How many work at a time: no more than there are clients, and one on a GPU.

        A process that was forked after CUDA began cannot use it, and one client at a time keeps a GPU busy.
        """
        device = self._resident.device
        if device.type == "cpu":
            return min(workers, max(2, len(self._resident.data.clients)))
        if self._venue.name in ENGINES:  # elsewhere clients have devices of their own
            self._progress.note(f"one client at a time on {device}; bits are promised on the CPU alone")
        return 1

    def _open_sinks(self, last: Checkpoint | None) -> list[MetricSink]:
        names = [*self._run.output.sinks, *(["tensorboard"] if self._run.output.tensorboard else [])]
        return [open_sink(name, self._folder.path, 0 if last is None else last.round + 1) for name in names]

    def _rounds(self, scorer: Scorer, pool: Workers, last: Checkpoint | None) -> Checkpoint:
        """The rounds on the chosen engine; returns the final checkpoint."""
        if last is not None and last.round >= self._run.run.rounds:
            self._announce()
            return last
        server = RoundServer(
            resident=self._resident,
            journal=self._folder,
            observer=_Observer(self._progress, self._sinks),
            evaluate=scorer.evaluate,
            step=self._progress.setup,
            ready=self._announce,
            budget=self._folder,
            history=self._folder,
            evaluate_each=scorer.evaluate_each,
        )
        if self._resident.start:
            self._progress.note(OWN_MODELS)
        return self._venue.hold(server, last, pool)

    def _announce(self, roster: Roster | None = None) -> None:
        """Write the first row once, and tell people in any case."""
        row = self._folder.read_start()
        if row is None:
            row = make_start_row(self._resident, self._metrics, self._venue.name, roster)
            self._folder.append(row)
        for sink in self._sinks:
            sink.write(row)
        self._progress.show_start(row)
        covered = coverage_notes(self._resident.model, self._run.peft)
        for note in (*promise_notes(row.privacy), *attack_notes(row), *covered):
            self._progress.note(note)

    def _baselines(self, scorer: Scorer, rounds: list[Round]) -> None:
        done = self._folder.baselines()
        for row in done:
            self._progress.baseline_done(row)
        for row in run_baselines(scorer, self._start, rounds, done, self._progress.baseline_progress):
            self._folder.append(row)
            for sink in self._sinks:
                sink.write(row)
            self._progress.baseline_done(row)

    def _plug_in(self, final: Checkpoint) -> None:
        """In offsite tuning: put the adapter into the full model, and score that, where it is at hand."""
        emulator = emulator_to_plug(self._resident)
        if emulator is None:
            self._progress.note("the full model is not here: the emulator alone was scored")
            return
        self._progress.setup("plugging the adapter into the full model")
        plugged = self._folder.path / PLUGGED
        write_adapter(self._resident, self._folder, final)
        with folder_atomically(plugged) as fresh:
            write_plugged(self._resident, emulator, self._folder.adapter, fresh)
        done = {row.name for row in self._folder.baselines()}
        for row in offsite_scores(self._resident, self._metrics, plugged, done):
            self._folder.append(row)
            for sink in self._sinks:
                sink.write(row)
            self._progress.baseline_done(row)

    def _finish(self, final: Checkpoint, rounds: list[Round]) -> None:
        """Adapter, last row, report: in this order, so that the last one there means all are."""
        resident, folder = self._resident, self._folder
        self._progress.setup("writing adapter and report")
        write_adapter(resident, folder, final)
        note = compare_adapter(resident, folder.adapter)
        if note:
            self._progress.note(note)
        if not any(isinstance(row, Finished) for row in folder.rows()):
            up, down = _bytes_per_client(rounds)
            row = Finished(
                rounds=final.round,
                adapter_digest=adapter_digest(folder.adapter),
                bytes_up_per_client=up,
                bytes_down_per_client=down,
                stopped=_describe_stop(self._run, final.round),
                peak_rss_mib=_peak_rss_mib(),
                peak_device_mib=_peak_device_mib(self._resident),
                wall_s=time.monotonic() - self._began,
            )
            folder.append(row)
            self._progress.show_end(row)
        write_summary(folder)


def write_adapter(resident: LoadedRun, folder: RunFolder, checkpoint: Checkpoint) -> None:
    """Write the adapter of a round into the run's folder, whole or not at all, with tokenizer and model card.

    Raises:
        StorageError: it cannot be written.
    """
    resident.space.enter(resident.parameters, checkpoint.state)
    run = resident.run
    with folder_atomically(folder.adapter) as fresh:
        export_adapter(resident.model, fresh, base_name=public_name(run.model))
        write_tokenizer(resident.tokenizer, fresh)
        write_card(
            fresh,
            run,
            digest=resident.run_digest,
            base_digest=resident.base_digest,
            round_=checkpoint.round,
        )


def compare_adapter(resident: LoadedRun, adapter: Path) -> str:
    """Refuse an adapter folder that makes another model of its base than the one that was trained.

    Returns:
        Why nothing was compared; empty if it was.

    Raises:
        ModelError: the models differ, or the folder cannot be loaded.
    """
    if bytes_of_copy(resident.model) > available_memory():
        return "the adapter was not compared with the trained model: memory has no room for another copy"
    run = resident.run
    base = load_base(run.model, num_labels=resident.data.num_labels, seed=derive_seed(run.run.seed, "head"))
    loaded = load_adapter(base, adapter, decomposition_of_model(resident.model))
    rows = draw_token_rows(loaded)
    with full_memory_refused():
        found = read_logits(move(loaded, resident.device), rows)
    refuse_difference(
        loaded,
        read_logits(resident.model, rows),
        found,
        what=f"the adapter in {adapter}",
        keep="adapter and checkpoints are kept",
    )
    return ""


def write_summary(folder: RunFolder) -> None:
    """Write summary and report of what the folder's rows say; the adapter is there.

    Raises:
        StorageError: they cannot be written.
    """
    rows = folder.rows()
    text = json.dumps(summary_json(build_summary(rows)), indent=2) + "\n"
    write_atomically(folder.path / "summary.json", text.encode())
    write_report(folder.path, run_toml(folder.run), rows, _snippet(folder, "adapter"))


class _Observer:
    """Tells the progress display and the sinks."""

    def __init__(self, progress: Progress, sinks: Sequence[MetricSink]) -> None:
        self._progress, self._sinks = progress, sinks

    def round_started(self, number: int, asked: int) -> None:
        self._progress.round_started(number, asked)

    def client_done(self, outcome: ClientOutcome) -> None:
        self._progress.client_done(outcome)

    def round_done(self, row: Round) -> None:
        for sink in self._sinks:
            sink.write(row)
        self._progress.round_done(row)


def run_metrics(run: RunConfig) -> tuple[str, ...]:
    """The run's metrics, the primary one first; see `metrics_of`."""
    return metrics_of(run.model.task, run.evaluation.metrics, answers=has_answers(run))


def make_start_row(
    resident: LoadedRun, metrics: tuple[str, ...], engine: str, roster: Roster | None
) -> Started:
    """What a run says of itself before it begins; without a roster, its clients are those of its rows."""
    run, data = resident.run, resident.data
    private = run.privacy is not None
    clients = {client.name: len(client.train) for client in data.clients}
    if roster is not None and set(roster.members) != set(clients):  # they have rows of their own
        clients = {name: roster.members[name].examples for name in roster.names}
    if private:
        clients = dict.fromkeys(clients, 0)
    trainable, total = count_parameters(resident.model)
    return Started(
        run_name=run.run.name,
        run_digest=resident.run_digest,
        seed=run.run.seed,
        rounds=run.run.rounds,
        engine=engine,
        clients=clients,
        test_examples=len(rows_of(resident, TEST)[1]) if may_score(run) else 0,
        test_of_clients=run.data.test is None and run.data.train != "embedded",
        baselines=run.evaluation.baselines and bool(data.clients),
        trainable_parameters=trainable,
        total_parameters=total,
        base_digest=resident.base_digest,
        device=str(resident.device),
        cut_rows=0 if private else data.cut_rows,
        attack="" if resident.hostile is None else resident.hostile.attack.kind,
        attackers=() if resident.hostile is None else resident.hostile.names,
        labels=data.label_names,
        primary_metric=metrics[0],
        higher_is_better={name: METRICS[name].higher_is_better for name in metrics},
        privacy=promise_of(run, measured=may_score(run) and len(data.test) > 0),
        versions={"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _VERSIONS}
        | plugin_versions(run),
    )


def plugin_versions(run: RunConfig) -> dict[str, str]:
    """Return version and digest of each plugin that a run uses, by `plugin NAME`."""
    used = plugins_of(run, devices_only=False)
    return {f"{_PLUGIN}{plugin.name}": f"{plugin.version} {plugin.digest}" for plugin in used}


def refuse_other_plugins(folder: RunFolder) -> None:
    """Compare the plugins that a begun run was begun with with those that are installed.

    Raises:
        StateError: they differ.
    """
    begun, now = folder.read_start(), plugin_versions(folder.run)
    if begun is None:
        return
    before = {name: version for name, version in begun.versions.items() if name.startswith(_PLUGIN)}
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            had, has = (each.get(name, "none") for each in (before, now))
            raise StateError(
                f"{folder.path} was begun with {name} {had} and {has} is installed; install that version, or"
                " begin the run anew in another folder"
            )


def promise_of(run: RunConfig, *, measured: bool) -> Promise | None:
    """What a private run promises; None without privacy."""
    kind = kind_of(run)
    if run.privacy is None or kind is None:
        return None
    event, budget = event_of(run), budget_of(run)
    return Promise(
        kind=event.kind,
        neighbours=event.neighbours,
        against=kind.against,
        noise_multiplier=event.noise_multiplier,
        sample_rate=event.release().sample_rate,
        target_delta=budget.target_delta,
        max_epsilon=budget.max_epsilon,
        seeded=run.privacy.seeded,
        measured=measured,
    )


def _describe_stop(run: RunConfig, last: int) -> str:
    """Why a run ended before its last round, which only a spent budget makes it do well; empty: it didn't."""
    if last >= run.run.rounds:
        return ""
    limit = budget_of(run).max_epsilon
    return f"stopped by budget after round {last}: the next would exceed epsilon {limit:g}"


def _result(folder: RunFolder) -> RunResult:
    return RunResult(folder.path, build_summary(folder.rows()), _snippet(folder, str(folder.adapter)))


def _snippet(folder: RunFolder, adapter: str) -> str:
    """The lines that load the adapter; labels that the run file doesn't list come from the rows."""
    tables, started = tomllib.loads(run_toml(folder.run)), folder.read_start()
    if started is not None and started.labels:
        tables["data"]["labels"] = list(started.labels)
    return load_snippet(tables, adapter)


def _bytes_per_client(rounds: Sequence[Round]) -> tuple[float, float]:
    """Mean bytes up and down over the clients that exchanged any."""
    up: dict[str, int] = {}
    down: dict[str, int] = {}
    for row in rounds:
        for outcome in row.outcomes:
            if outcome.bytes_down:
                up[outcome.client] = up.get(outcome.client, 0) + outcome.bytes_up
                down[outcome.client] = down.get(outcome.client, 0) + outcome.bytes_down
    return (sum(up.values()) / len(up), sum(down.values()) / len(down)) if up else (0.0, 0.0)


def _peak_device_mib(resident: LoadedRun) -> float | None:
    """The most that tensors took of a GPU's memory; None on the CPU."""
    peak = peak_memory(resident.device)
    return None if peak is None else peak / 2**20


def _peak_rss_mib() -> float:
    """The largest resident size that any of our processes had; Linux counts in KiB, macOS in bytes."""
    largest = max(
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return largest / (1024 if platform.system() == "Linux" else 1024 * 1024)
