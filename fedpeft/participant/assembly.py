"""What all who hold a run load alike: tokenizer, base model, adapter, space and stages."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fedpeft.config.client_groups import refuse_idle
from fedpeft.config.run_file import run_digest
from fedpeft.config.sections import ModelSection, PeftSection, RunConfig
from fedpeft.data.federated import FederatedData, encode
from fedpeft.data.tables import RawFederated
from fedpeft.errors import ModelError, RunFileError
from fedpeft.models.attach import attach
from fedpeft.models.base_model import Tokenizer, load_base, load_tokenizer
from fedpeft.models.device import device_named, full_memory_refused, move
from fedpeft.models.trainable import digest_frozen, read_parameters, trainable_parameters
from fedpeft.participant.loaded_run import LoadedRun
from fedpeft.participant.row_length import refuse_long_rows
from fedpeft.runtime.randomness import derive_seed
from fedpeft.seedspace.layout import CounterStream
from fedpeft.spaces import Space, build_space
from fedpeft.spaces.directions import direction_stream
from fedpeft.stages import build_stages
from fedpeft.training.layers import check_layers
from fedpeft.training.lean import device_problems
from fedpeft.training.row_isolation import verify_gradients_apart, verify_losses_apart

Admit = Callable[[RunConfig, FederatedData], None]
"""Asked once the rows are there and before any weight is read; refuses by raising."""


def device_for(run: RunConfig) -> torch.device:
    """The device that a run file asks for; anything but an agent computes there.

    Raises:
        RunFileError: this machine has none such.
    """
    try:
        return device_named(run.model.device)
    except ModelError as error:
        raise RunFileError("run file", [f"model.{error}"]) from error


def trainable_on(run: RunConfig) -> torch.device:
    """The device that a run file asks for, if the run's clients can train on it; nothing is read for it.

    Raises:
        RunFileError: this machine has none such, or it can't do what the run asks for.
    """
    device = device_for(run)
    refuse_device(run, device)
    return device


def refuse_device(run: RunConfig, device: torch.device) -> None:
    """Refuse what clients cannot do on a device.

    Raises:
        RunFileError: with every such thing.
    """
    problems = device_problems(run, cuda=device.type == "cuda")
    if problems:
        raise RunFileError("run file", problems)


def assemble(
    run: RunConfig,
    raw: RawFederated,
    section: ModelSection,
    device: torch.device,
    admit: Admit | None = None,
    peft: PeftSection | None = None,
    start_bytes: bytes = b"",
) -> LoadedRun:
    """Load everything but the rows, which is the same for all who hold a run, or for those of one group.

    Args:
        raw: the rows, as text.
        section: the base model as it is held here.
        device: where the model goes once it is complete.
        admit: asked before the base model is loaded.
        peft: default the run's own.
        start_bytes: `LoadedRun.start_bytes` of who has loaded the run before; empty: nobody's is known.

    Raises:
        DataError, ModelError, RunFileError: what cannot be encoded, loaded or attached.
    """
    stages = build_stages(run)
    tokenizer = load_tokenizer(section)
    data = encode(raw, tokenizer, run.data, run.model.task, hides_rows=run.hides_rows)
    if admit is not None:
        admit(run.model_copy(update={"model": section}), data)
    body = load_body(
        run, section, run.peft if peft is None else peft, tokenizer, data.num_labels, device, start_bytes
    )
    names = trainable_parameters(body.model)
    for part in (run, *(run.of_group(group) for group in run.groups)):
        check_layers(part.training, list(names))
    refuse_idle(run, names)
    if run.hides_rows:
        _verify_rows_apart(run, body.model, tokenizer, data.num_labels)
    resident = LoadedRun(
        run,
        run_digest(run),
        body.model,
        tokenizer,
        data,
        body.space,
        stages,
        body.digest,
        body.directions,
        body.group_directions,
    )
    resident.start = {
        name: array for name, array in read_parameters(names).items() if resident.shares.is_private(name)
    }
    return resident


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model, and what depends on it alone."""

    model: nn.Module
    space: Space
    digest: str
    directions: CounterStream
    group_directions: tuple[CounterStream, ...]


def load_body(
    run: RunConfig,
    section: ModelSection,
    peft: PeftSection,
    tokenizer: Tokenizer,
    num_labels: int | None,
    device: torch.device,
    start_bytes: bytes = b"",
) -> LoadedModel:
    """Load the base model and attach the adapter; see `assemble`."""
    seed = run.run.seed
    head = derive_seed(seed, "head")
    base = load_base(section, num_labels=num_labels, seed=head, tokenizer=tokenizer)
    refuse_long_rows(run, peft, base)
    own = derive_seed(seed, "adapter")
    model = attach(base, peft, task=run.model.task, seed=own, start_bytes=start_bytes)
    model.eval()
    digest = digest_frozen(model)
    with full_memory_refused():
        move(model, device)  # before a space or a stream takes hold of its parameters
    space, directions = build_space(run, model), direction_stream(run, model)
    group_directions = tuple(direction_stream(run.of_group(group), model) for group in run.groups)
    for each in (directions, *group_directions):
        digest = _with_support(digest, each)
    return LoadedModel(model, space, digest, directions, group_directions)


def _verify_rows_apart(run: RunConfig, model: nn.Module, tokenizer: Tokenizer, labels: int | None) -> None:
    """Check that this very model keeps nothing from one row to the next, on made-up rows.

    Raises:
        PrivacyError: it does.
    """
    task, sizes = run.model.task, {"vocabulary": len(tokenizer), "labels": labels or 2}
    if run.training.kind == "first-order":
        verify_gradients_apart(model, trainable_parameters(model), run.training, task, **sizes)
    else:
        verify_losses_apart(model, task, **sizes)


def _with_support(digest: str, directions: CounterStream) -> str:
    """The digest of the frozen part, and of what directions leave out by the values of weights."""
    support = "" if directions.support is None else directions.support.digest
    return hashlib.sha256(f"{digest} {support}".encode()).hexdigest() if support else digest
