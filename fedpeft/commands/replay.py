"""`fedpeft replay`."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from fedpeft.commands.export import check_out
from fedpeft.config import RunConfig
from fedpeft.errors import StateError, StorageError, UsageError
from fedpeft.files import folder_atomically, storage
from fedpeft.ledger import Checkpoint, RunFolder
from fedpeft.models.export import merge_adapter
from fedpeft.models.quiet import one_line, quiet
from fedpeft.resident import Resident, load_resident
from fedpeft.training.zeroth_rules import SEED_SPACES


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
    config, checkpoint = _last(run)
    check_out(out, run, force=force, what="the run")
    resident = load_resident(config)
    resident.space.enter(resident.parameters, checkpoint.state)  # compares the fingerprint
    _write(resident, out)
    size = sum(array.nbytes for array in checkpoint.state.values())
    print(
        f"model        {out}\nround        {checkpoint.round}\n"
        f"rebuilt from {size} bytes of integers and the base"
    )


def _last(path: Path) -> tuple[RunConfig, Checkpoint]:
    """The run and its last checkpoint."""
    with RunFolder.resume(path) as folder:
        if folder.run.space.kind not in SEED_SPACES:
            raise UsageError(
                f"{path} is a run of space '{folder.run.space.kind}', whose updates are not seeds; write its"
                " model with: fedpeft export --merge"
            )
        checkpoint = folder.latest()
        if checkpoint is None:
            raise StateError(f"{path} has no checkpoint yet; go on with: fedpeft simulate --resume {path}")
        return folder.run, checkpoint


def _write(resident: Resident, out: Path) -> None:
    """Fold the trained parameters into the base and write a folder that `transformers` loads by itself.

    Raises:
        StorageError: it cannot be written.
        ModelError: the method cannot be merged.
    """
    merged = merge_adapter(resident.model)
    labels = resident.data.label_names
    if labels:
        config = merged.config
        config.id2label = dict(enumerate(labels))  # type: ignore[union-attr]  # a transformers config
        config.label2id = {label: index for index, label in enumerate(labels)}  # type: ignore[union-attr]
    with storage(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with folder_atomically(out) as fresh, quiet():
        try:
            merged.save_pretrained(fresh)  # type: ignore[operator]  # a transformers model
            resident.tokenizer.save_pretrained(fresh)
        except SafetensorError as error:
            raise StorageError(
                f"{out}: the model cannot be written ({one_line(error)}); free disk space and try again"
            ) from error
