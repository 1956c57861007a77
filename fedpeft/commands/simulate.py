"""`fedpeft simulate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedpeft.commands.runs import run_of
from fedpeft.errors import UsageError
from fedpeft.ledger import RunFolder
from fedpeft.preflight import refuse_problems
from fedpeft.reporting.progress import make_progress
from fedpeft.simulation.engine import simulate


def simulate_command(
    run_file: Path | None,
    overrides: Sequence[str],
    *,
    out: Path | None,
    resume: Path | None,
    force: bool,
    workers: int,
    engine: str,
    progress: str,
) -> None:
    """Run or resume, and print the result.

    Raises:
        FedPEFTError: anything that `fedpeft.errors` names.
    """
    if resume is not None:
        if run_file is not None or overrides or out is not None or force:
            raise UsageError(
                "--resume DIR takes the run file in DIR; leave out RUN.toml, --set, --out, --force and"
                " --baselines"
            )
        folder = RunFolder.resume(resume)
    else:
        run = run_of(run_file, overrides)
        refuse_problems(run, source=str(run_file or "demo"))
        folder = RunFolder.create(out or Path("runs") / run.run.name, run, force=force)
    with folder, make_progress(progress) as shown:
        result = simulate(folder, workers=workers, engine=engine, progress=shown)
        shown.result(result.summary, result.paths, result.snippet)
