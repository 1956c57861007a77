"""`fedpeft simulate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedpeft.commands.arguments import run_of
from fedpeft.config.sections import RunConfig
from fedpeft.data.federated import FederatedData
from fedpeft.errors import RunFileError, UsageError
from fedpeft.ledger import RunFolder
from fedpeft.models.device import available_memory
from fedpeft.participant.assembly import Admit, device_for, trainable_on
from fedpeft.planning.memory_admission import refuse_oversized
from fedpeft.planning.preflight import refuse_problems, simulation_problems
from fedpeft.reporting.progress import make_progress
from fedpeft.runtime.console import at_work_on
from fedpeft.simulation.engine import check_engine, simulate


def simulate_command(
    run_file: Path | None,
    overrides: Sequence[str],
    *,
    out: Path | None,
    resume: Path | None,
    data: str | None,
    test_data: str | None,
    force: bool,
    workers: int,
    engine: str,
    progress: str,
    memory_check: bool = True,
) -> None:
    """Run or resume, and print the result.

    Args:
        data, test_data: where the rows of a run that is resumed lie now; None: where they lay before.

    Raises:
        FedPEFTError: anything that `fedpeft.errors` names.
    """
    check_engine(engine)  # before there is a folder
    if resume is not None:
        if run_file is not None or overrides or out is not None or force:
            raise UsageError(
                "--resume DIR takes the run file in DIR; leave out RUN.toml, --set, --out, --force and"
                " --baselines"
            )
        folder = RunFolder.resume(resume, train=data, test=test_data)
    elif data is not None or test_data is not None:
        raise UsageError(
            "--data and --test-data go with --resume: they say where its rows lie now; name the rows of a new"
            " run in its run file, or with --set data.train=PATH"
        )
    else:
        run = run_of(run_file, overrides)
        source = str(run_file or "demo")
        refuse_problems(run, source=source)
        if impossible := simulation_problems(run):  # before there is a folder
            raise RunFileError(source, impossible)
        trainable_on(run)
        folder = RunFolder.create(out or Path("runs") / run.run.name, run, force=force)
    with at_work_on(folder.path), folder, make_progress(progress) as shown:
        admit = _admission(workers) if memory_check else None
        result = simulate(folder, workers=workers, engine=engine, progress=shown, admit=admit)
        shown.result(result.summary, result.paths, result.snippet)


def _admission(workers: int) -> Admit:
    """Refuse what this machine's free memory cannot hold."""

    def admit(run: RunConfig, data: FederatedData) -> None:
        device = device_for(run)
        gpu = device.type != "cpu"
        at_once = 1 if gpu else min(workers, len(data.clients))
        refuse_oversized(run, data, limit=available_memory(device), workers=at_once, gpu=gpu)

    return admit
