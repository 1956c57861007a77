"""Adapters as commands take them, folders or `.fpz` files, and where their training began."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fedpeft.codec import Expert, read_expert
from fedpeft.codec.expert_file import SUFFIX
from fedpeft.commands.adapters import label_names
from fedpeft.commands.arguments import adapter_folder
from fedpeft.config.run_file import run_digest
from fedpeft.config.sections import ModelSection, PeftSection, RunConfig, Section
from fedpeft.errors import ModelError, UpdateError
from fedpeft.ledger.checkpoint import read_checkpoint
from fedpeft.ledger.run_place import CHECKPOINTS, read_run, run_folder_of, run_with_rows
from fedpeft.models.attach import attach
from fedpeft.models.base_model import load_base
from fedpeft.models.comparison import draw_token_rows, read_logits, refuse_difference
from fedpeft.models.export import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    export_adapter,
    load_adapter,
    replace_adapter_weights,
)
from fedpeft.models.trainable import digest_frozen, trainable_parameters, write_parameters
from fedpeft.runtime.files import storage
from fedpeft.runtime.randomness import derive_seed
from fedpeft.updates.update import arrays_digest

Weights = dict[str, NDArray[np.float32]]


class AdapterStart(Section):
    """What it takes to draw an untrained adapter again.

    `digest` is the `arrays_digest` that it then has, `base_digest` the one of everything frozen around it.
    """

    model: ModelSection
    peft: PeftSection
    seed: int
    num_labels: int | None = None
    digest: str = ""
    base_digest: str = ""


@dataclass(frozen=True)
class Adapter:
    """One adapter.

    Attributes:
        config: what `adapter_config.json` holds.
        weights: float32, by the names of the adapter's file.
        start: where its training began, if that is known.
        initial: the weights there; given with `start`.
    """

    config: Mapping[str, Any]
    weights: Weights
    start: AdapterStart | None = None
    initial: Weights | None = None


def read_adapter(path: Path, init: Path | None = None) -> Adapter:
    """An adapter from its folder, a run's folder, or a `.fpz` file, decompressed.

    Args:
        init: a run's folder, whose first checkpoint is taken for the start instead of drawing it again.

    Raises:
        UsageError: neither a folder nor a file there.
        ModelError, UpdateError, StorageError: what cannot be read, or does not fit together.
    """
    if path.suffix == SUFFIX or path.is_file():
        return _from_file(path, init)
    folder = adapter_folder(path)
    config, weights = read_folder(folder)
    run_folder = init or run_folder_of(folder)
    if run_folder is None:
        return Adapter(config, weights)
    start, initial = start_of_run(run_folder)
    _check_same_tensors(weights, initial, folder)
    return Adapter(config, weights, start, initial)


def read_folder(folder: Path) -> tuple[dict[str, Any], Weights]:
    """Config and float32 weights of an adapter folder.

    Raises:
        ModelError: a file is missing or unreadable, or the weights are no floats.
    """
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ModelError(
                f"'{folder}' is no adapter folder: {name} is missing; give the adapter/ of a run"
            )
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"the adapter in '{folder}' cannot be read: {error}") from error
    integral = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if not isinstance(config, dict) or not tensors or integral:
        what = (
            f"tensor {integral[0]!r} holds integers, which neither compressing nor merging may change"
            if integral
            else "no config or no tensors"
        )
        raise ModelError(f"the adapter in '{folder}' cannot be used: {what}")
    return config, {name: tensor.float().numpy() for name, tensor in sorted(tensors.items())}


def write_folder(folder: Path, config: Mapping[str, Any], weights: Weights) -> None:
    """Write an adapter folder that `peft.PeftModel.from_pretrained` loads, into an existing empty folder.

    Raises:
        StorageError: it cannot be written.
    """
    tensors = {name: torch.from_numpy(array.copy()) for name, array in sorted(weights.items())}
    with storage(folder):
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def compare_written(folder: Path, weights: Weights, start: AdapterStart | None) -> None:
    """Refuse an adapter folder that makes another model of its base than these weights do.

    Args:
        start: how the base is loaded and the adapter attached; None: nobody knows, and nothing is compared.

    Raises:
        ModelError: the models differ, or one cannot be loaded.
    """
    if start is None:
        return
    model = _attach(start)
    replace_adapter_weights(model, weights)
    rows = draw_token_rows(model)
    wanted = read_logits(model, rows)
    del model
    loaded = load_adapter(_base(start), folder)
    found = read_logits(loaded, rows)
    refuse_difference(loaded, wanted, found, what="the adapter", keep="nothing was written")


def delta_of(adapter: Adapter) -> Weights:
    """The weights minus the start where it is known; else the weights themselves."""
    if adapter.initial is None:
        return adapter.weights
    return {name: array - adapter.initial[name] for name, array in adapter.weights.items()}


def add_delta(initial: Weights | None, delta: Mapping[str, NDArray[np.float32]]) -> Weights:
    """Inverse of `delta_of`, up to one rounding."""
    if initial is None:
        return {name: np.asarray(array) for name, array in delta.items()}
    return {name: (array + initial[name]).astype(np.float32) for name, array in delta.items()}


def start_of_run(folder: Path) -> tuple[AdapterStart, Weights]:
    """Where the adapter of a run folder began: drawn again, in the first checkpoint's state where it is kept.

    Raises:
        StateError: the checkpoint is corrupt or foreign.
        FedPEFTError: the run file or the base model cannot be used.
    """
    run = read_run(folder)
    labels = label_names(run_with_rows(folder))
    start = AdapterStart(model=run.model, peft=run.peft, seed=run.run.seed, num_labels=len(labels) or None)
    return _draw(start, _first_checkpoint(folder, run))


def _first_checkpoint(folder: Path, run: RunConfig) -> Mapping[str, NDArray[Any]] | None:
    path = folder / CHECKPOINTS / "round-000000.safetensors"
    if run.space.kind != "adapter-delta" or not path.is_file():
        return None
    return read_checkpoint(path, run_digest(run)).state


@dataclass(frozen=True)
class _Origin:
    """A start, and the state that its first checkpoint keeps: told apart by text and fingerprint."""

    start: str
    fingerprint: str
    state: Mapping[str, NDArray[Any]] | None = field(compare=False)


def _draw(
    start: AdapterStart, state: Mapping[str, NDArray[Any]] | None = None
) -> tuple[AdapterStart, Weights]:
    """The untrained adapter by the names of its file, in `state` if given; and `start` with both digests."""
    plain = start.model_copy(update={"digest": "", "base_digest": ""})
    made, initial = _draw_once(_Origin(plain.model_dump_json(), arrays_digest(state or {}), state))
    return start.model_copy(update={"digest": made.digest, "base_digest": made.base_digest}), dict(initial)


@functools.lru_cache(maxsize=2)  # adapters that are merged began at one place: the base is loaded once
def _draw_once(origin: _Origin) -> tuple[AdapterStart, Weights]:
    start, state = AdapterStart.model_validate_json(origin.start), origin.state
    model = _attach(start)
    if state is not None:
        write_parameters(trainable_parameters(model), state)
    with tempfile.TemporaryDirectory() as folder:
        export_adapter(model, Path(folder), base_name="")
        initial = read_folder(Path(folder))[1]
    digests = {"digest": arrays_digest(initial), "base_digest": digest_frozen(model)}
    return start.model_copy(update=digests), initial


def _base(start: AdapterStart) -> nn.Module:
    return load_base(start.model, num_labels=start.num_labels, seed=derive_seed(start.seed, "head"))


def _attach(start: AdapterStart) -> nn.Module:
    """The model with its untrained adapter."""
    seed = derive_seed(start.seed, "adapter")
    return attach(_base(start), start.peft, task=start.model.task, seed=seed)


def _from_file(path: Path, init: Path | None) -> Adapter:
    expert = read_expert(path)
    config = expert.metadata.get("adapter_config")
    if not isinstance(config, dict):
        raise UpdateError(f"{path} holds no adapter_config; write it with: fedpeft compress")
    delta: Weights = {name: tensor.dense() for name, tensor in expert.tensors.items()}
    start = _start_in(path, expert)
    if start is None:
        return Adapter(config, delta)
    here, initial = start_of_run(init) if init is not None else _draw(start)
    _check_same_tensors(delta, initial, path)
    for what, came, made in (
        ("base model", here.base_digest, start.base_digest),
        ("untrained adapter", here.digest, start.digest),
    ):
        if came != made:
            raise ModelError(
                f"{path}: the {what} has digest {came[:12]} here and {made[:12]} where the file was made; use"
                " the same base model, or give the run's folder with --init"
            )
    return Adapter(config, add_delta(initial, delta), start, initial)


def _start_in(path: Path, expert: Expert) -> AdapterStart | None:
    given = expert.metadata.get("start")
    try:
        return None if given is None else AdapterStart.model_validate(given)
    except ValidationError as error:
        raise UpdateError(f"{path}: its start cannot be read ({error.error_count()} problems)") from error


def _check_same_tensors(weights: Weights, initial: Weights, path: Path) -> None:
    for name in sorted(weights.keys() | initial.keys()):
        came, drawn = (w[name].shape if name in w else "missing" for w in (weights, initial))
        if came != drawn:
            raise ModelError(
                f"{path}: tensor {name!r} is {came}, and {drawn} in the untrained adapter of the run; give"
                " the folder of the run that it came from"
            )
