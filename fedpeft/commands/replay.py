"""`fedpeft replay`."""

from __future__ import annotations

from pathlib import Path

from fedpeft.commands.export import check_out, write_merged
from fedpeft.config.sections import DataSection, RunConfig
from fedpeft.config.traits import Trait
from fedpeft.errors import StateError, UsageError
from fedpeft.ledger import Checkpoint, RunFolder
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.spaces import space_traits


def replay_command(run: Path, out: Path, *, force: bool) -> None:
    """Rebuild the model of a seed-space run from its base and the integers of its last checkpoint.

    Args:
        run: the run's folder.
        out: the folder to write: a full Hugging Face model with its tokenizer; whole or not at all.
        force: replace a model that is in `out`.

    Raises:
        UsageError: the run is not of an exact seed space.
        StateError: no checkpoint, or `out` is in the way.
        ModelError: the rebuilt weights have another fingerprint than the run's.
        FedPEFTError: what else keeps the model from being loaded, merged or written.
    """
    config, data, checkpoint = _last(run)
    check_out(out, run, force=force, what="the run")
    resident = load_simulated_run(config, data=data)
    resident.space.enter(resident.parameters, checkpoint.state)  # compares the fingerprint
    write_merged(resident.model, resident.tokenizer, resident.data.label_names, out, config.model)
    size = sum(array.nbytes for array in checkpoint.state.values())
    print(
        f"model        {out}\nround        {checkpoint.round}\n"
        f"rebuilt from {size} bytes of integers and the base"
    )


def _last(path: Path) -> tuple[RunConfig, DataSection, Checkpoint]:
    """The run, where its rows lie, and its last checkpoint."""
    with RunFolder.resume(path) as folder:
        if Trait.INTEGER_UPDATES not in space_traits(folder.run.space.kind):
            raise UsageError(
                f"{path} is a run of space '{folder.run.space.kind}', whose updates are not seeds; write its"
                " model with: fedpeft export --merge"
            )
        checkpoint = folder.latest()
        if checkpoint is None:
            raise StateError(f"{path} has no checkpoint yet; go on with: fedpeft simulate --resume {path}")
        return folder.run, folder.data, checkpoint
