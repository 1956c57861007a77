"""The Python API: what the command line does, for programs and notebooks; `fedpeft` gives it by name.

Every function leaves the process as it found it: numbers of threads, the state of global generators, signal
handlers, the environment, warnings and log levels. A run computes on one thread per worker, as from the
command line, so that results are the same; the caller's threads are there again afterwards.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import threading
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedpeft.config.run_file import build_run, run_toml
from fedpeft.config.run_file import load_run as read_run
from fedpeft.config.sections import RunConfig
from fedpeft.errors import MissingExtraError, RunFileError, StateError
from fedpeft.ledger.records import Evaluation, Finished, Round, Row, Started, parse_row
from fedpeft.ledger.run_place import ADAPTER, REPORT, ROWS
from fedpeft.plugins import register

if TYPE_CHECKING:
    from fedpeft.planning.plan import Plan

T = TypeVar("T")
Run = RunConfig | Mapping[str, Any] | Path | str
"""A run: as `load_run` returns it, as nested tables, or the path of a run file."""


@dataclass(frozen=True)
class Result:
    """What a run has come to.

    Attributes:
        folder: of the run.
    """

    folder: Path

    @property
    def rows(self) -> tuple[Row, ...]:
        """Everything that the run reports, in order: `Started`, `Round`, `Baseline` and `Finished` rows.

        Raises:
            StateError: the folder holds no run.
        """
        path = self.folder / ROWS
        if not path.is_file():
            raise StateError(f"{self.folder} holds no run; give the folder that simulate or pull wrote")
        return tuple(parse_row(line) for line in path.read_bytes().splitlines())

    @property
    def started(self) -> Started:
        """The first row: clients, sizes, versions."""
        return next(row for row in self.rows if isinstance(row, Started))

    @property
    def rounds(self) -> tuple[Round, ...]:
        """The rows of rounds, the one before training (number 0) included."""
        return tuple(row for row in self.rows if isinstance(row, Round))

    @property
    def finished(self) -> Finished | None:
        """The last row; None of a run that has not ended."""
        return next((row for row in self.rows if isinstance(row, Finished)), None)

    @property
    def metrics(self) -> list[dict[str, float]]:
        """One table for each round that was evaluated: `round`, and each metric of the test set by name."""
        return [
            {"round": row.round, **{name: score.value for name, score in row.evaluation.scores.items()}}
            for row in self.rounds
            if row.evaluation is not None
        ]

    def frame(self) -> Any:
        """Return `metrics` as a pandas DataFrame with the round as its index.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas  # type: ignore[import-untyped]  # it brings no types
        except ImportError as error:
            raise MissingExtraError("a frame needs pandas; install it, or use metrics") from error
        return pandas.DataFrame(self.metrics).set_index("round")

    @property
    def adapter(self) -> Path:
        """The adapter's folder, as `peft` loads it."""
        return self.folder / ADAPTER

    @property
    def report(self) -> Path:
        """The report, one HTML file."""
        return self.folder / REPORT


def load_run(
    run: Run, overrides: Sequence[str] = (), *, folder: Path | None = None, source: str = "run"
) -> RunConfig:
    """Read and check a run; its method, strategy, stages and so on are checked by `check`.

    Args:
        run: a run file's path, nested tables, or a run, which comes back with the overrides in it.
        overrides: items like ``training.lr=1e-4``, as `--set` takes them.
        folder: what relative paths of nested tables are resolved against; None: they stay as they are.
        source: what errors call nested tables.

    Raises:
        RunFileError: with every problem at once.
    """
    if isinstance(run, RunConfig):
        return run if not overrides else build_run(tomllib.loads(run_toml(run)), overrides, source=source)
    if isinstance(run, str | Path):
        return read_run(Path(run), overrides)
    return build_run(run, overrides, source=source, folder=folder)


def check(run: Run) -> list[str]:
    """Return one line per problem of a run, without loading rows or a model; empty where there is none."""
    from fedpeft.planning.preflight import problems_of

    try:
        return [*problems_of(load_run(run))]
    except RunFileError as error:
        return list(error.problems)


def simulate(
    run: Run,
    overrides: Sequence[str] = (),
    *,
    out: Path | str | None = None,
    force: bool = False,
    workers: int = 1,
    engine: str = "local",
    progress: str = "quiet",
    baselines: bool | None = None,
) -> Result:
    """Fine-tune across simulated clients on this machine.

    Args:
        run: see `Run`.
        overrides: as `load_run` takes them.
        out: folder of the run; None: ``runs/NAME``.
        force: replace a run that is already there.
        workers: processes that train at a time; with 1 all is done in this one. The result is the same.
        engine: "local", or "ray" for Flower's simulation engine.
        progress: "quiet", "rich" for people, or "json".
        baselines: compare with zero-shot, clients alone and pooled data; None: as the run says.

    Raises:
        RunFileError: with every problem of the run at once.
        RunExistsError: `out` holds another run.
        FedPEFTError: see `fedpeft.errors`. Every committed round stays; `resume` goes on with it.
    """
    from fedpeft.ledger import RunFolder
    from fedpeft.planning.preflight import refuse_problems, simulation_problems

    config = load_run(run, overrides)
    if baselines is not None:
        config = load_run(config, [f"evaluation.baselines={str(baselines).lower()}"])
    source = str(run) if isinstance(run, str | Path) else config.run.name
    refuse_problems(config, source=source)
    if impossible := simulation_problems(config):
        raise RunFileError(source, impossible)
    place = Path(out) if out is not None else Path("runs") / config.run.name
    return _simulate(RunFolder.create(place, config, force=force), workers, engine, progress)


def resume(folder: Path | str, *, workers: int = 1, progress: str = "quiet") -> Result:
    """Go on with a simulated run after its last committed round; a finished one is left as it is.

    Raises:
        StateError: the folder holds no run, or it was begun with other plugins.
        FedPEFTError: as `simulate`.
    """
    from fedpeft.ledger import RunFolder

    return _simulate(RunFolder.resume(Path(folder)), workers, "local", progress)


def _simulate(opened: Any, workers: int, engine: str, progress: str) -> Result:
    from fedpeft.reporting.progress import make_progress
    from fedpeft.simulation.engine import simulate as run_simulation

    with process_unchanged(), opened as folder, make_progress(progress) as shown:
        run_simulation(folder, workers=workers, engine=engine, progress=shown)
    return Result(folder.path)


def plan(run: Run, overrides: Sequence[str] = ()) -> Plan:
    """Say what a run would cost and what would be refused, without training: bytes, memory, steps, epsilon.

    Raises:
        RunFileError: the run can't be read as one.
    """
    from fedpeft.planning.plan import make_plan

    with process_unchanged():
        return make_plan(load_run(run, overrides))


def evaluate(adapter: Path | str, run: Path | str | None = None, overrides: Sequence[str] = ()) -> Evaluation:
    """Measure an adapter as a run's last round does: scores with intervals, and those of each client.

    Args:
        adapter: its folder, or the folder of a run.
        run: the run file with model and data; None: that of the run whose folder the adapter lies in.

    Raises:
        FedPEFTError: no adapter, no run file, rows or a model that cannot be used.
    """
    from fedpeft.commands.arguments import adapter_and_run
    from fedpeft.commands.evaluate import evaluate_adapter

    folder, config = adapter_and_run(Path(adapter), None if run is None else Path(run), overrides)
    with process_unchanged():
        return evaluate_adapter(config, folder)


@dataclass(frozen=True)
class Server:
    """A server with agents, as its submitter sees it; each method calls it once.

    Attributes:
        address: HOST:PORT.
        keys: the caller's folder of key and certificate; None: plaintext, on this machine only.
    """

    address: str
    keys: Path | None = None

    def submit(
        self, run: Run, overrides: Sequence[str] = (), *, min_agents: int = 0, agents: Sequence[str] = ()
    ) -> str:
        """Queue a run and return its id; the server says what it would refuse.

        Args:
            min_agents: begin with so many; 0: with as many as the run has clients.
            agents: ask these alone, by name.

        Raises:
            RunFileError: every problem of the run.
            FedPEFTError: what the server answered, or that it didn't.
        """
        from fedpeft.v1 import federation_pb2 as pb
        from fedpeft_client.transport.admin_client import new_submission

        request = pb.SubmitRunRequest(
            run_toml=run_toml(load_run(run, overrides)),
            cohort=pb.CohortRules(min_agents=min_agents, agents=agents),
            submission=new_submission(),
        )
        return str(self._ask(lambda client: client.call(lambda stub: stub.SubmitRun(request))).id)

    def status(self, run_id: str) -> dict[str, Any]:
        """Return how a run stands: its status, round, metrics and agents, by name."""
        from fedpeft.v1 import federation_pb2 as pb
        from fedpeft_client.commands.run_commands import info_table

        request = pb.RunRequest(id=run_id)
        return dict(info_table(self._ask(lambda client: client.call(lambda stub: stub.ShowRun(request)))))

    def pull(self, run_id: str, out: Path | str) -> Result:
        """Write a run's adapter, report and rows to a new folder: the last ones that there are."""
        self._ask(lambda client: client.pull(run_id, Path(out)))
        return Result(Path(out))

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """Ask in a thread of its own, so that a notebook's event loop is no hindrance."""
        from fedpeft_client.transport.admin_client import AdminClient

        client = AdminClient(self.address, self.keys)

        async def answer() -> Any:
            return await question(client)

        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: asyncio.run(answer())).result()


def connect(address: str, *, keys: Path | str | None = None) -> Server:
    """Return a server to submit runs to; nothing is sent yet.

    Args:
        address: HOST:PORT.
        keys: the folder that `fedpeft provision` made for a submitter; None: plaintext, on this machine only.
    """
    return Server(address, None if keys is None else Path(keys))


def submit(run: Run, overrides: Sequence[str] = (), *, server: str, keys: Path | str | None = None) -> str:
    """Queue a run on a server and return its id; see `RoundServer.submit`."""
    return connect(server, keys=keys).submit(run, overrides)


@contextmanager
def process_unchanged() -> Iterator[None]:
    """Put back, at the end, what work in this process changes for others.

    Numbers of threads, torch's and Python's global generators, gradient mode, signal handlers (on the main
    thread), the environment, warning filters and log levels; and the run that was loaded is let go.
    """
    import numpy as np
    import torch

    from fedpeft.participant.loaded_run import add_loaded_run, drop_loaded_run, list_loaded_runs

    on_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment, threads = dict(os.environ), torch.get_num_threads()
    levels = {name: logging.getLogger(name).level for name in ("flwr", "transformers", "peft", "fedpeft")}
    python, numbers = random.getstate(), np.random.get_state()
    gradients, loaded = torch.is_grad_enabled(), list_loaded_runs()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            yield
    finally:
        for run in list_loaded_runs():
            drop_loaded_run(run.run_digest)
        for run in loaded:
            add_loaded_run(run)
        torch.set_num_threads(threads)
        torch.set_grad_enabled(gradients)
        random.setstate(python)
        np.random.set_state(numbers)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for number, handler in handlers.items() if on_main else ():
            signal.signal(number, handler)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def stage(name: str) -> Callable[[T], T]:
    """Enter a stage (a class that is a `Stage`) in this process under a name; a decorator."""
    return register("stages", name)


def strategy(name: str) -> Callable[[T], T]:
    """Enter a strategy (a class that is a `Strategy`) in this process under a name; a decorator."""
    return register("strategies", name)


def lora_rule(name: str, rule: T) -> T:
    """Enter a `LoraRule` in this process under a name."""
    return register("lora_rules", name)(rule)


def peft_method(name: str, method: T) -> T:
    """Enter a PEFT `Method` in this process under a name."""
    return register("peft_methods", name)(method)


def file_format(suffix: str) -> Callable[[T], T]:
    """Enter a reader of files with a suffix, such as ".xml", in this process; a decorator."""
    return register("formats", suffix)


def metric(name: str, measure: T) -> T:
    """Enter a `Metric` in this process under a name."""
    return register("metrics", name)(measure)


def sink(name: str) -> Callable[[T], T]:
    """Enter a function that opens a sink of rows, given the run's folder and the first round; a decorator."""
    return register("sinks", name)


def attack(name: str) -> Callable[[T], T]:
    """Enter an attack (a class that is an `Attack`) in this process under a name; a decorator."""
    return register("attacks", name)
