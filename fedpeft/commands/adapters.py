"""Finding an adapter folder and putting it on its base model."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from fedpeft.config.sections import RunConfig
from fedpeft.data.federated import encode
from fedpeft.data.labels import label_map
from fedpeft.data.run_tables import read_tables
from fedpeft.models.base_model import load_base, load_tokenizer
from fedpeft.models.device import move
from fedpeft.models.export import adapter_digest, load_adapter
from fedpeft.models.trainable import digest_frozen
from fedpeft.participant.assembly import device_for
from fedpeft.participant.loaded_run import LoadedRun
from fedpeft.participant.row_length import refuse_long_rows
from fedpeft.runtime.randomness import derive_seed
from fedpeft.spaces.adapter_delta import AdapterDelta


def resident_with_adapter(run: RunConfig, adapter: Path) -> LoadedRun:
    """The run's rows and its base model with a finished adapter on it, which has nothing left to train.

    Its state, in the adapter-delta space, is therefore empty: evaluate it with ``{}``. It goes by the
    adapter's digest instead of the run's, so that it is never taken for the run itself.

    Raises:
        DataError, ModelError: what cannot be read, loaded or attached.
        RunFileError: a device that is not there.
    """
    device = device_for(run)
    raw = read_tables(run.data, run.model.task, run.run.seed, hides_rows=run.hides_rows)
    tokenizer = load_tokenizer(run.model)
    data = encode(raw, tokenizer, run.data, run.model.task, hides_rows=run.hides_rows)
    model = _base_with_adapter(run, adapter, data.num_labels)
    refuse_long_rows(run, run.peft, model.get_base_model())  # type: ignore[operator]  # a PeftModel, untyped
    base_digest = digest_frozen(model)
    move(model, device)
    return LoadedRun(run, adapter_digest(adapter), model, tokenizer, data, AdapterDelta(), (), base_digest)


def model_with_adapter(run: RunConfig, adapter: Path) -> tuple[nn.Module, tuple[str, ...]]:
    """The base model with a finished adapter on it, and the names of the classes (none for language models).

    Rows are read only where they alone tell how many classes there are.

    Raises:
        DataError, ModelError: what cannot be read, loaded or attached.
    """
    names = label_names(run)
    return _base_with_adapter(run, adapter, len(names) or None), names


def label_names(run: RunConfig) -> tuple[str, ...]:
    """Names of a classifier's classes, from the run file or else from the rows; none for language models."""
    if run.model.task != "sequence-classification":
        return ()
    if run.data.labels is not None:
        return label_map(run.data.labels).names
    return read_tables(run.data, run.model.task, run.run.seed).label_names


def _base_with_adapter(run: RunConfig, adapter: Path, num_labels: int | None) -> nn.Module:
    base = load_base(run.model, num_labels=num_labels, seed=derive_seed(run.run.seed, "head"))
    return load_adapter(base, adapter)
