"""What a process keeps loaded between tasks: base model, adapter, rows, space and stages of one run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedpeft.config import RunConfig, TrainingSection
from fedpeft.data.collate import evaluation_batches
from fedpeft.data.encoded import Encoded
from fedpeft.data.federated import FederatedData, encode, read_tables
from fedpeft.errors import FederationError
from fedpeft.evaluation.metrics import Column
from fedpeft.evaluation.scoring import score
from fedpeft.models.attach import attach
from fedpeft.models.base import Tokenizer, load_base, load_tokenizer
from fedpeft.models.trainable import frozen_digest, trainable_parameters
from fedpeft.randomness import derive_seed, stream
from fedpeft.runfile import run_digest
from fedpeft.spaces import Space, Trail, build_space, direction_stream
from fedpeft.stages import Stage, build_stages
from fedpeft.training import zeroth_order
from fedpeft.training.first_order import Rows, TrainingReport, train
from fedpeft.training.steps import local_steps
from fedpeft.update import Arrays, Update


@dataclass
class Resident:
    """One run, loaded. Everything but the trainable parameters stays as it is after loading.

    Attributes:
        model: base model with the adapter attached, in evaluation mode.
        base_digest: fingerprint of everything frozen, after the adapter was attached.
    """

    run: RunConfig
    run_digest: str
    model: nn.Module
    tokenizer: Tokenizer
    data: FederatedData
    space: Space
    stages: tuple[Stage, ...]
    base_digest: str

    @functools.cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by canonical name."""
        return trainable_parameters(self.model)

    @functools.cached_property
    def prober(self) -> zeroth_order.Prober:
        """The model as zeroth-order trainers see it."""
        return zeroth_order.prober(self.model, direction_stream(self.run.run.seed))

    def rows(self, encoded: Encoded, indices: NDArray[np.int64]) -> Rows:
        """Rows as the trainer and the scorer take them."""
        return Rows(encoded, indices, self.run.model.task, _pad_id(self.tokenizer))

    def client_index(self, name: str) -> int:
        """Position of a client by name.

        Raises:
            FederationError: no such client.
        """
        for index, client in enumerate(self.data.clients):
            if client.name == name:
                return index
        raise FederationError(f"there is no client {name!r}; the run has {len(self.data.clients)} clients")

    def train_client(
        self, index: int, round_: int, state: Arrays, *, proximal_mu: float
    ) -> tuple[Update, TrainingReport]:
        """One client's part of a round: enter the state, train on its rows, express the change."""
        client, section = self.data.clients[index], self.run.training
        steps = local_steps(section, len(client.train))
        rng = stream(self.run.run.seed, "train", client.name, round_)
        report, trail = self._train(client.train, state, section, steps, rng, proximal_mu)
        arrays = self.space.express(self.parameters, state, trail)
        metrics = {"loss": report.loss, "steps": report.steps, "examples": report.examples}
        return Update(arrays, len(client.train), metrics), report

    def train_alone(
        self, indices: NDArray[np.int64], state: Arrays, section: TrainingSection, *, steps: int, name: str
    ) -> Arrays:
        """A baseline: one training run over `indices` from `state`; the state it ends in."""
        rng = stream(self.run.run.seed, "baseline", name)
        _, trail = self._train(indices, state, section, steps, rng)
        change = self.space.express(self.parameters, state, trail)
        return self.space.apply(state, {key: array.astype(np.float64) for key, array in change.items()})

    def _train(
        self,
        indices: NDArray[np.int64],
        state: Arrays,
        section: TrainingSection,
        steps: int,
        rng: np.random.Generator,
        proximal_mu: float = 0.0,
    ) -> tuple[TrainingReport, Trail | None]:
        """Enter the state and train on some rows, as the section says; a trail from zeroth-order trainers."""
        self.space.enter(self.parameters, state)
        if section.kind == "none":
            return TrainingReport(0.0, 0, 0), None
        rows = self.rows(self.data.rows, indices)
        if section.kind == "zeroth-order":
            route = self.space.route(state, steps * section.queries, rng)
            return zeroth_order.train(self.prober, rows, section, route, steps=steps, rng=rng)
        report = train(
            self.model, self.parameters, rows, section, steps=steps, rng=rng, proximal_mu=proximal_mu
        )
        return report, None

    def batches(self, encoded: Encoded, indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Evaluation batches; their composition depends on the run only."""
        return evaluation_batches(encoded, indices, self.run.evaluation.batch_size)

    def score(
        self, encoded: Encoded, batches: Sequence[NDArray[np.int64]], state: Arrays, metrics: Sequence[str]
    ) -> dict[str, Column]:
        """Per-example columns of `state` on some batches."""
        self.space.enter(self.parameters, state)
        rows = self.rows(encoded, np.zeros(0, dtype=np.int64))
        new_tokens = self.run.evaluation.max_new_tokens
        return score(self.model, self.tokenizer, rows, batches, metrics, max_new_tokens=new_tokens)


def load_resident(run: RunConfig) -> Resident:
    """Read the rows, load the base model, attach the adapter.

    Raises:
        DataError, ModelError, RunFileError: what cannot be read, loaded or attached.
    """
    seed = run.run.seed
    stages = build_stages(run)
    raw = read_tables(run.data, run.model.task, seed)
    tokenizer = load_tokenizer(run.model)
    data = encode(raw, tokenizer, run.data, run.model.task)
    base = load_base(run.model, num_labels=data.num_labels, seed=derive_seed(seed, "head"))
    model = attach(base, run.peft, task=run.model.task, seed=derive_seed(seed, "adapter"))
    model.eval()
    space = build_space(run, model)
    return Resident(run, run_digest(run), model, tokenizer, data, space, stages, frozen_digest(model))


_RESIDENTS: dict[str, Resident] = {}  # by run digest; a process holds one run at a time


def install_resident(resident: Resident) -> None:
    """Make `resident` the one that this process, and processes forked from it, work with."""
    _RESIDENTS.clear()
    _RESIDENTS[resident.run_digest] = resident


def resident_for(digest: str, run: RunConfig | None = None) -> Resident:
    """The loaded run with this digest; loaded now if `run` is given and it isn't.

    Raises:
        FederationError: it is not loaded and there is no run file to load it from.
    """
    if digest not in _RESIDENTS:
        if run is None:
            raise FederationError(
                f"run {digest[:12]} is not loaded in this process and no run file came with the task"
            )
        install_resident(load_resident(run))
    return _RESIDENTS[digest]


def _pad_id(tokenizer: Tokenizer) -> int:
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)
