"""What a process keeps loaded between tasks: base model, adapter, rows, space and stages of one run."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpeft.aggregation.lora_rules import Shares
from fedpeft.attacks import Hostile
from fedpeft.config.sections import LocalPrivacy, RecordLevelPrivacy, RunConfig, TrainingSection
from fedpeft.data.collate import evaluation_batches
from fedpeft.data.encoded import Encoded
from fedpeft.data.federated import FederatedData
from fedpeft.errors import FederationError, TrainingError, UpdateError
from fedpeft.evaluation.metrics import Column
from fedpeft.evaluation.scoring import score
from fedpeft.models.base_model import Tokenizer
from fedpeft.models.device import device_of, full_memory_refused, release
from fedpeft.models.frozen_products import get_frozen_factors
from fedpeft.models.starts import start_of_model
from fedpeft.models.trainable import pack_parameters, read_parameters, resting, trainable_parameters
from fedpeft.privacy.noise_sources import noise_source
from fedpeft.runtime.randomness import stream
from fedpeft.seedspace.layout import CounterStream
from fedpeft.spaces import Memory, Space, Trail
from fedpeft.stages import Stage, stage_list
from fedpeft.training import private, zeroth_order
from fedpeft.training.first_order import Rows, TrainingReport, train
from fedpeft.training.self_pruning import SelfPruning, self_pruning
from fedpeft.training.steps import local_steps
from fedpeft.training.zeroth_prober import Prober, prober
from fedpeft.updates.update import Arrays, Update, freeze_arrays, layout_of

_KEPT = "kept/"  # in a client's memory: parameters that it keeps to itself
_RANK = "lora-rank"  # and what self-pruning has left of its adapter's rank, int64[1]


@dataclass
class LoadedRun:
    """One run, loaded. Everything but the trainable parameters stays as it is after loading.

    Attributes:
        model: base model with the adapter attached, in evaluation mode.
        base_digest: fingerprint of everything frozen, after the adapter was attached; with rule 'sparse' its
            mask, which is frozen too, takes part.
        directions: where zeroth-order trainers find theirs; None where there is nothing to train.
        group_directions: the same for each of the run's groups.
        hostile: a simulation's clients that attack it; None: all are honest.
        own: the run as clients of a group hold it that has a model of its own, by the group's number.
        start: parameters that clients keep to themselves, as they are before a client's first round.
    """

    run: RunConfig
    run_digest: str
    model: nn.Module
    tokenizer: Tokenizer
    data: FederatedData
    space: Space
    stages: tuple[Stage, ...]
    base_digest: str
    directions: CounterStream | None = None
    group_directions: tuple[CounterStream, ...] = ()
    hostile: Hostile | None = None
    own: Mapping[int, LoadedRun] = field(default_factory=dict)
    start: Arrays = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the model computes; updates and states are on the CPU."""
        return device_of(self.model)

    @functools.cached_property
    def stage_list(self) -> tuple[tuple[str, str], ...]:
        """The stages as an update names them."""
        return stage_list(self.stages)

    @property
    def start_bytes(self) -> bytes:
        """What spares others to compute the model's start; empty where there is nothing to compute."""
        return start_of_model(self.model)

    @functools.cached_property
    def shares(self) -> Shares:
        """What each client holds, trains and sends."""
        return Shares(self.run)

    def of_client(self, client: str) -> LoadedRun:
        """The run as one client holds it."""
        group = self.run.group_of(client)
        return self if group is None else self.own.get(group, self)

    def loads(self, client: str) -> bool:
        """Whether the model that a client holds is loaded here; that of its group may be elsewhere alone."""
        group = self.run.group_of(client)
        return group is None or not self.run.groups[group].own_model or group in self.own

    @property
    def clients_here(self) -> int:
        """Clients whose rows are here."""
        return len(self.data.clients)

    def initial_state(self) -> Arrays:
        """The state that the run starts from: that of the parameters now, so ask before they move."""
        return self.space.initial_state(self.parameters)

    def base_of(self, client: str) -> str | None:
        """`base_digest` of the model that a client holds; None: that of its group is not loaded here."""
        return self.of_client(client).base_digest if self.loads(client) else None

    def get_frozen_factors(self) -> Arrays:
        """LoRA's A where it doesn't train, by its parameter's name."""
        return get_frozen_factors(self.model)

    def own_states(self, state: Arrays, memories: Arrays, nodes: Mapping[str, int]) -> dict[str, Arrays]:
        """A state as each client has it, with what it keeps to itself.

        Args:
            memories: of all clients, by ``"<node>/<array>"``.
            nodes: each client's number.
        """
        return {
            name: self.complete_state(state, select_memory(memories, node)) for name, node in nodes.items()
        }

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

    def _rows_of(self, client: str) -> Encoded:
        """All rows, as one client trains on its own among them."""
        hostile = self.hostile
        return hostile.rows if hostile is not None and client in hostile.names else self.data.rows

    def client_index(self, name: str) -> int:
        """Position of a client by name.

        Raises:
            FederationError: no such client.
        """
        index = self._places.get(name)
        if index is None:
            raise FederationError(
                f"there is no client {name!r}; the run has {len(self.data.clients)} clients"
            )
        return index

    @functools.cached_property
    def _places(self) -> dict[str, int]:
        """Position by name: looked up for every task, of runs with thousands of clients."""
        return {client.name: index for index, client in enumerate(self.data.clients)}

    def train_client(
        self, index: int, round_: int, state: Arrays, *, proximal_mu: float, memory: Memory | None = None
    ) -> tuple[Update, TrainingReport]:
        """One client's part of a round: what came of its training, or what a hostile one makes of that."""
        name = self.data.clients[index].name

        def train(client: str) -> tuple[Update, TrainingReport]:
            own = memory if client == name else None
            return self._train_honestly(self.client_index(client), round_, state, proximal_mu, own)

        with full_memory_refused():
            if self.hostile is not None and name in self.hostile.names:
                return self.hostile.send(name, round_, state, train)
            return train(name)

    def _train_honestly(
        self, index: int, round_: int, state: Arrays, proximal_mu: float, memory: Memory | None
    ) -> tuple[Update, TrainingReport]:
        """Enter the state, train on the client's rows, express the change.

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
        layout = self.shares.layout(self.data.clients[index].name, layout, round_)
        zeros = {name: np.zeros(shape, dtype=dtype) for name, (shape, dtype) in layout.items()}
        return Update(zeros), TrainingReport(0.0, 0, 0)

    def _train_openly(
        self, index: int, round_: int, state: Arrays, proximal_mu: float, memory: Memory | None
    ) -> tuple[Update, TrainingReport]:
        client = self.data.clients[index]
        section = self.run.of_client(client.name).training
        steps = local_steps(section, len(client.train))
        state = self.complete_state(state, memory)
        pruning = self._pruning(memory)
        with self._train_parameters(client.name, round_) as parameters:
            report, trail = self._train(
                client.train,
                state,
                section,
                steps,
                ("train", client.name, round_),
                proximal_mu,
                probe=lambda: self.prober_of(client.name),
                encoded=self._rows_of(client.name),
                parameters=parameters,
                pruning=pruning,
            )
        if memory is not None:
            kept = read_parameters({name: self.parameters[name] for name in self.start})
            memory.update({_KEPT + name: array for name, array in kept.items()})
        sent = self._part(lambda name: self.shares.is_sent(client.name, name, round_))
        begun = state if sent is self.parameters else {name: state[name] for name in sent}
        arrays = self.space.express(sent, begun, trail, memory)
        metrics = {"loss": report.loss, "steps": report.steps, "examples": report.examples}
        if pruning is not None:
            metrics["rank"] = report.rank
            if memory is not None:
                memory[_RANK] = np.array([report.rank], dtype=np.int64)
        return Update(arrays, len(client.train), metrics), report

    def _pruning(self, memory: Mapping[str, NDArray[Any]] | None) -> SelfPruning | None:
        """The ranks that a client still has, where clients may give some up."""
        section = self.run.federation.self_pruning
        if section is None:
            return None
        left = None if memory is None or _RANK not in memory else int(memory[_RANK][0])
        return self_pruning(self.parameters, section, left)

    def complete_state(self, state: Arrays, memory: Mapping[str, NDArray[Any]] | None) -> Arrays:
        """A state as it came, with what a client keeps to itself."""
        if not self.start:
            return state
        kept: Mapping[str, NDArray[Any]] = {} if memory is None else memory
        own = {name: kept.get(_KEPT + name, array) for name, array in self.start.items()}
        return freeze_arrays({**state, **own})

    def _part(self, wanted: Callable[[str], bool]) -> Mapping[str, nn.Parameter]:
        """Some of the parameters; the parameters themselves, side by side, if it is all of them."""
        if self.shares.all_alike:
            return self.parameters
        return {name: parameter for name, parameter in self.parameters.items() if wanted(name)}

    def _train_parameters(
        self, client: str, round_: int
    ) -> AbstractContextManager[Mapping[str, nn.Parameter]]:
        """What a client trains in a round; all else rests meanwhile."""
        moved = self._part(lambda name: self.shares.is_trained(client, name, round_))
        if moved is self.parameters:
            return nullcontext(moved)
        return resting(self.parameters, moved.keys())

    def _train_privately(
        self, index: int, round_: int, state: Arrays, privacy: RecordLevelPrivacy, proximal_mu: float
    ) -> tuple[Update, TrainingReport]:
        client, section = self.data.clients[index], self.run.training
        self.space.enter(self.parameters, state)
        rng = stream(self.run.run.seed, "train", client.name, round_)
        told = private.PrivateTrainingInputs(
            self.rows(self._rows_of(client.name), client.train),
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
        if section.sampled_layers and section.sample_every is None:  # one draw a round, as there
            section = section.model_copy(update={"sample_every": max(1, steps // self.run.run.rounds)})
        _, trail = self._train(indices, state, section, steps, ("baseline", name))
        change = self.space.express(self.parameters, state, trail)
        return self.space.apply(state, {key: array.astype(np.float64) for key, array in change.items()})

    def _train(
        self,
        indices: NDArray[np.int64],
        state: Arrays,
        section: TrainingSection,
        steps: int,
        purpose: tuple[str | int, ...],
        proximal_mu: float = 0.0,
        probe: Callable[[], Prober] | None = None,
        encoded: Encoded | None = None,
        parameters: Mapping[str, nn.Parameter] | None = None,
        pruning: SelfPruning | None = None,
    ) -> tuple[TrainingReport, Trail | None]:
        """Enter the state and train on some rows, as the section says; a trail from zeroth-order trainers.

        Args:
            purpose: names the stream of randomness; clients of a round share its last word.
            parameters: those that train; None: all.
            pruning: of a client that may give ranks up; its rank is in the report.
        """
        self.space.enter(self.parameters, state)
        before = 0.0
        if pruning is not None:
            pruning.clear()
            before = pruning.size()
        if section.kind == "none":
            return TrainingReport(0.0, 0, 0), None
        rng = stream(self.run.run.seed, *purpose)
        rows = self.rows(self.data.rows if encoded is None else encoded, indices)
        if section.kind == "zeroth-order":
            route = self.space.route(state, steps * section.queries, rng)
            own = self.prober if probe is None else probe()
            return zeroth_order.train(own, rows, section, route, steps=steps, rng=rng)
        report = train(
            self.model,
            self.parameters if parameters is None else parameters,
            rows,
            section,
            steps=steps,
            rng=rng,
            layers_rng=stream(self.run.run.seed, "layers", purpose[-1]) if section.sampled_layers else None,
            proximal_mu=proximal_mu,
            add_gradient=None if pruning is None else pruning.add_gradient,
        )
        return report if pruning is None else replace(report, rank=pruning.after(before)), None

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
        with full_memory_refused():
            return score(self.model, self.tokenizer, rows, batches, metrics, max_new_tokens=new_tokens)

    def compute_held_out_loss(
        self, index: int, state: Arrays, change: Arrays, memory: Memory | None = None
    ) -> float:
        """Mean loss of `state` moved by `change` on one client's held-out rows; NaN without any."""
        rows = self.data.clients[index].heldout[: self.run.evaluation.max_examples]
        if not len(rows):
            return math.nan
        state = self.complete_state(state, memory)
        wide = {name: array.astype(np.float64) for name, array in change.items()}
        if not self.shares.all_alike:  # what isn't sent stays where it is
            layout = self.space.update_layout(layout_of(state))
            wide = {name: np.zeros(shape) for name, (shape, _) in layout.items()} | wide
        moved = self.space.apply(state, wide)
        columns = self.score(self.data.rows, self.batches(self.data.rows, rows), moved, ("loss",))
        return float(np.mean(columns["nll"] / np.maximum(columns["tokens"], 1.0)))


def select_memory(memories: Mapping[str, NDArray[Any]], node: int) -> dict[str, NDArray[Any]]:
    """What one client remembers, from the memories of all by ``"<node>/<array>"``."""
    mine = f"{node}/"
    return {name.removeprefix(mine): array for name, array in memories.items() if name.startswith(mine)}


_RESIDENTS: dict[str, LoadedRun] = {}  # by run digest; one run at a time, except where runs are added


def set_loaded_run(resident: LoadedRun) -> None:
    """Make `resident` the one that this process, and processes forked from it, work with."""
    _RESIDENTS.clear()
    release()
    add_loaded_run(resident)


def add_loaded_run(resident: LoadedRun) -> None:
    """Let this process work with `resident` as well, beside other runs."""
    _RESIDENTS[resident.run_digest] = resident


def drop_loaded_run(digest: str) -> None:
    """Let go of a run, and with it of its memory."""
    _RESIDENTS.pop(digest, None)
    release()


def list_loaded_runs() -> tuple[LoadedRun, ...]:
    """The runs that are loaded in this process."""
    return tuple(_RESIDENTS.values())


def has_loaded_run(digest: str) -> bool:
    """Whether the run with this digest is loaded."""
    return digest in _RESIDENTS


def get_loaded_run(digest: str) -> LoadedRun:
    """The loaded run with this digest.

    Raises:
        FederationError: it is not loaded.
    """
    if digest not in _RESIDENTS:
        raise FederationError(f"run {digest[:12]} is not loaded in this process")
    return _RESIDENTS[digest]


def _pad_id(tokenizer: Tokenizer) -> int:
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id or 0)
