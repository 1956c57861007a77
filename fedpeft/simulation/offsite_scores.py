"""Scores of the full model that an emulator stands for: untrained, and with what the run trained."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from pathlib import Path

from fedpeft.config.sections import ModelSection
from fedpeft.ledger.records import Baseline
from fedpeft.ledger.run_place import PLUGGED
from fedpeft.models.base_model import load_base
from fedpeft.models.device import move
from fedpeft.models.export import load_adapter
from fedpeft.models.offsite import Emulator, check_source, emulator_of, plug_in
from fedpeft.models.trainable import digest_frozen
from fedpeft.participant.loaded_run import LoadedRun, add_loaded_run, drop_loaded_run
from fedpeft.runtime.randomness import derive_seed
from fedpeft.simulation.parallel_scoring import Scorer
from fedpeft.spaces.adapter_delta import AdapterDelta
from fedpeft.workers import open_workers

FULL = "full-model"


def emulator_to_plug(resident: LoadedRun) -> Emulator | None:
    """The run's emulator, where the full model to plug into is at hand."""
    folder, base = resident.run.evaluation.plug_into, resident.model.get_base_model()  # type: ignore[operator]
    return emulator_of(base) if folder is not None and Path(folder).is_dir() else None


def write_plugged(resident: LoadedRun, emulator: Emulator, adapter: Path, out: Path) -> None:
    """Write the run's adapter as one of the full model.

    Raises:
        ModelError: the full model is another than the one that the emulator was made from.
    """
    full = resident.run.evaluation.plug_into or ""
    check_source(emulator, full)
    plug_in(adapter, out, emulator, base_name=full)


def offsite_scores(
    resident: LoadedRun, metrics: tuple[str, ...], plugged: Path, done: Collection[str]
) -> Iterator[Baseline]:
    """Score the full model as it is and with the plugged-in adapter; nothing where no row may be scored.

    Args:
        plugged: folder of the adapter.
        done: names of what is scored already.

    Raises:
        ModelError: the model or the adapter cannot be loaded.
    """
    for name, adapter in ((FULL, None), (PLUGGED, plugged)):
        if name in done:
            continue
        began = time.monotonic()
        full = _full_resident(resident, name, adapter)
        add_loaded_run(full)
        try:
            with open_workers(1) as workers:
                evaluation = Scorer(full, metrics, workers).evaluate({})
        finally:
            drop_loaded_run(full.run_digest)
        if evaluation is not None:
            row = {"name": name, "evaluations": {name: evaluation}, "wall_s": time.monotonic() - began}
            yield Baseline.model_validate(row)


def _full_resident(resident: LoadedRun, name: str, adapter: Path | None) -> LoadedRun:
    """The run's rows with the full model, unquantised, which has nothing to train."""
    run = resident.run
    section = ModelSection(path=run.evaluation.plug_into or "", task=run.model.task, dtype=run.model.dtype)
    seed = derive_seed(run.run.seed, "head")
    model = load_base(section, num_labels=resident.data.num_labels, seed=seed)
    if adapter is not None:
        model = load_adapter(model, adapter)
    digest = digest_frozen(model)
    move(model, resident.device)
    return LoadedRun(
        run=run,
        run_digest=f"{resident.run_digest}:{name}",
        model=model,
        tokenizer=resident.tokenizer,
        data=resident.data,
        space=AdapterDelta(),
        stages=(),
        base_digest=digest,
    )
