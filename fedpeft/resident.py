"""What a process keeps loaded between tasks: base model, adapter, rows, space and stages of one run."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedpeft.config import LocalPrivacy, ModelSection, RecordLevelPrivacy, RunConfig, TrainingSection
from fedpeft.data.collate import evaluation_batches
from fedpeft.data.encoded import Encoded
from fedpeft.data.federated import FederatedData, RawFederated, encode, read_tables
from fedpeft.data.tables import read_client_table, read_test_table
from fedpeft.errors import FederationError, TrainingError, UpdateError
from fedpeft.evaluation.metrics import Column
from fedpeft.evaluation.scoring import score
from fedpeft.groups import refuse_unknown
from fedpeft.models.attach import attach
from fedpeft.models.base import Tokenizer, load_base, load_tokenizer
from fedpeft.models.trainable import frozen_digest, pack_parameters, trainable_parameters
from fedpeft.privacy.sources import noise_source
from fedpeft.randomness import derive_seed, stream
from fedpeft.runfile import run_digest
from fedpeft.seedspace.layout import Stream
from fedpeft.spaces import Memory, Space, Trail, build_space, direction_stream
from fedpeft.stages import Stage, build_stages
from fedpeft.training import zeroth_order
from fedpeft.training.first_order import Rows, TrainingReport, train
from fedpeft.training.steps import local_steps
from fedpeft.training.zeroth_prober import Prober, prober
from fedpeft.update import Arrays, Update, layout_of


@dataclass
class Resident:
    """One run, loaded. Everything but the trainable parameters stays as it is after loading.

    Attributes:
        model: base model with the adapter attached, in evaluation mode.
        base_digest: fingerprint of everything frozen, after the adapter was attached; with rule 'sparse' its
            mask, which is frozen too, takes part.
        directions: where zeroth-order trainers find theirs; None where there is nothing to train.
        group_directions: the same for each of the run's groups.
    """

    run: RunConfig
    run_digest: str
    model: nn.Module
    tokenizer: Tokenizer
    data: FederatedData
    space: Space
    stages: tuple[Stage, ...]
    base_digest: str
    directions: Stream | None = None
    group_directions: tuple[Stream, ...] = ()

    @functools.cached_property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Trainable parameters by canonical name, side by side in one tensor where that is possible."""
        return pack_parameters(trainable_parameters(self.model))

    @functools.cached_property
    def prober(self) -> Prober:
        """The model as zeroth-order trainers see it.

        Raises:
            FederationError: the resident was not loaded to be trained.
        """
        if self.directions is None:
            raise FederationError("this model was loaded for evaluation only; load the run to train it")
        return prober(self.model, self.directions)

    def prober_of(self, client: str) -> Prober:
        """The model as the zeroth-order trainer of one client sees it."""
        group = self.run.group_of(client)
        return self.prober if group is None else self._group_probers[group]

    @functools.cached_property
    def _group_probers(self) -> list[Prober]:
        return [
            self.prober if directions == self.directions else prober(self.model, directions)
            for directions in self.group_directions
        ]

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
        self, index: int, round_: int, state: Arrays, *, proximal_mu: float, memory: Memory | None = None
    ) -> tuple[Update, TrainingReport]:
        """One client's part of a round: enter the state, train on its rows, express the change.

        Under record-level privacy nothing but the noised change and the number of steps is told. Under local
        privacy a training that fails is a change of zero: staying away would tell about the rows.
        """
        if isinstance(self.run.privacy, RecordLevelPrivacy):
            return self._train_privately(index, round_, state, self.run.privacy, proximal_mu)
        try:
            return self._train_openly(index, round_, state, proximal_mu, memory)
        except (TrainingError, UpdateError):
            if not isinstance(self.run.privacy, LocalPrivacy):
                raise
        layout = self.space.update_layout(layout_of(state))
        zeros = {name: np.zeros(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
        return Update(zeros), TrainingReport(0.0, 0, 0)

    def _train_openly(
        self, index: int, round_: int, state: Arrays, proximal_mu: float, memory: Memory | None
    ) -> tuple[Update, TrainingReport]:
        client = self.data.clients[index]
        section = self.run.of_client(client.name).training
        steps = local_steps(section, len(client.train))
        rng = stream(self.run.run.seed, "train", client.name, round_)
        report, trail = self._train(
            client.train, state, section, steps, rng, proximal_mu, probe=lambda: self.prober_of(client.name)
        )
        arrays = self.space.express(self.parameters, state, trail, memory)
        metrics = {"loss": report.loss, "steps": report.steps, "examples": report.examples}
        return Update(arrays, len(client.train), metrics), report

    def _train_privately(
        self, index: int, round_: int, state: Arrays, privacy: RecordLevelPrivacy, proximal_mu: float
    ) -> tuple[Update, TrainingReport]:
        from fedpeft.training import private  # Opacus is slow to load, and few runs need it

        client, section = self.data.clients[index], self.run.training
        self.space.enter(self.parameters, state)
        rng = stream(self.run.run.seed, "train", client.name, round_)
        told = private.Told(
            self.rows(self.data.rows, client.train),
            section,
            privacy,
            rng,
            noise_source(self.run, "train", client.name, round_),
        )
        trail = None
        if section.kind == "zeroth-order":
            route = self.space.route(state, (section.steps or 1) * section.queries, rng)
            report, trail = private.train_by_scalars(self.prober, route, told)
        else:
            report = private.train_by_gradients(self.model, self.parameters, told, proximal_mu=proximal_mu)
        arrays = self.space.express(self.parameters, state, trail)
        return Update(arrays, metrics={"steps": report.steps}), TrainingReport(0.0, report.steps, 0)

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
        probe: Callable[[], Prober] | None = None,
    ) -> tuple[TrainingReport, Trail | None]:
        """Enter the state and train on some rows, as the section says; a trail from zeroth-order trainers."""
        self.space.enter(self.parameters, state)
        if section.kind == "none":
            return TrainingReport(0.0, 0, 0), None
        rows = self.rows(self.data.rows, indices)
        if section.kind == "zeroth-order":
            route = self.space.route(state, steps * section.queries, rng)
            own = self.prober if probe is None else probe()
            return zeroth_order.train(own, rows, section, route, steps=steps, rng=rng)
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

    def held_out_loss(self, index: int, state: Arrays, change: Arrays) -> float:
        """Mean loss of `state` moved by `change` on one client's held-out rows; NaN without any."""
        rows = self.data.clients[index].heldout[: self.run.evaluation.max_examples]
        if not len(rows):
            return math.nan
        moved = self.space.apply(state, {name: array.astype(np.float64) for name, array in change.items()})
        columns = self.score(self.data.rows, self.batches(self.data.rows, rows), moved, ("loss",))
        return float(np.mean(columns["nll"] / np.maximum(columns["tokens"], 1.0)))


def load_resident(run: RunConfig) -> Resident:
    """Read the rows, load the base model, attach the adapter.

    Raises:
        DataError, ModelError, RunFileError: what cannot be read, loaded or attached.
    """
    raw = read_tables(run.data, run.model.task, run.run.seed)
    refuse_unknown(run, {client.name for client in raw.clients})
    return _loaded(run, raw, run.model)


@dataclass(frozen=True)
class Own:
    """What a device brings to a run that others describe.

    Attributes:
        client: its name in the run.
        data: its file or folder of rows; the run's own sources and partitioner play no part.
        model: where its copy of the base model lies; empty: where the run file says.
    """

    client: str
    data: Path
    model: str = ""


def load_own_resident(run: RunConfig, own: Own) -> Resident:
    """A run as one device takes part in it: one client, with its own rows.

    The client has the rows, the split and the weight that it has in a simulation in which its file is one of
    several, under the same name.

    Raises:
        DataError, ModelError, RunFileError: as `load_resident`.
    """
    raw = read_client_table(run.data, own.data, run.model.task, run.run.seed, own.client)
    section = run.model.model_copy(update={"path": own.model}) if own.model else run.model
    return _loaded(run, raw, section)


def load_serving_resident(run: RunConfig) -> Resident:
    """A run as a server holds it whose clients are elsewhere: no client's rows, only the test set, if any.

    Raises:
        DataError, ModelError, RunFileError: as `load_resident`.
    """
    return _loaded(run, read_test_table(run.data, run.model.task), run.model)


def _loaded(run: RunConfig, raw: RawFederated, section: ModelSection) -> Resident:
    """Everything but the rows is the same for all who hold a run."""
    seed = run.run.seed
    stages = build_stages(run)
    tokenizer = load_tokenizer(section)
    data = encode(raw, tokenizer, run.data, run.model.task)
    base = load_base(section, num_labels=data.num_labels, seed=derive_seed(seed, "head"))
    model = attach(base, run.peft, task=run.model.task, seed=derive_seed(seed, "adapter"))
    model.eval()
    space, directions = build_space(run, model), direction_stream(run, model)
    group_directions = tuple(direction_stream(run.of_group(group), model) for group in run.groups)
    base_digest = frozen_digest(model)
    for each in (directions, *group_directions):
        base_digest = _with_support(base_digest, each)
    if isinstance(run.privacy, RecordLevelPrivacy) and run.training.kind == "first-order":
        _prove_gradients(run, model, tokenizer, data.num_labels)
    return Resident(
        run, run_digest(run), model, tokenizer, data, space, stages, base_digest, directions, group_directions
    )


def _prove_gradients(run: RunConfig, model: nn.Module, tokenizer: Tokenizer, labels: int | None) -> None:
    """Check this very model's per-example gradients, on made-up rows.

    Raises:
        PrivacyError: they are wrong.
    """
    from fedpeft.training.private import verify_model

    verify_model(model, trainable_parameters(model), run.model.task, vocabulary=len(tokenizer), labels=labels)


def _with_support(digest: str, directions: Stream) -> str:
    """The digest of the frozen part, and of what directions leave out by the values of weights."""
    support = "" if directions.support is None else directions.support.digest
    return hashlib.sha256(f"{digest} {support}".encode()).hexdigest() if support else digest


_RESIDENTS: dict[str, Resident] = {}  # by run digest; one run at a time, except where runs are added


def install_resident(resident: Resident) -> None:
    """Make `resident` the one that this process, and processes forked from it, work with."""
    _RESIDENTS.clear()
    add_resident(resident)


def add_resident(resident: Resident) -> None:
    """Let this process work with `resident` as well, beside other runs."""
    _RESIDENTS[resident.run_digest] = resident


def drop_resident(digest: str) -> None:
    """Let go of a run, and with it of its memory."""
    _RESIDENTS.pop(digest, None)


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
