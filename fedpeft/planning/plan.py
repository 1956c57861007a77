"""The plan of a run: everything that can be known of it before it trains."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from torch import nn

from fedpeft.config.client_groups import refuse_idle, refuse_unknown
from fedpeft.config.run_file import run_digest
from fedpeft.config.sampling import cohort_size
from fedpeft.config.sections import RunConfig
from fedpeft.data.federated import FederatedData
from fedpeft.errors import RunFileError
from fedpeft.evaluation.metrics import metrics_of
from fedpeft.models.coverage import coverage_notes
from fedpeft.models.methods import METHODS, with_options
from fedpeft.models.trainable import count_parameters, trainable_parameters
from fedpeft.participant.assembly import trainable_on
from fedpeft.planning.draws import RoundsPlan, draw_rounds
from fedpeft.planning.groups import GroupPlan, plan_groups
from fedpeft.planning.loading import Loaded, Problems, load
from fedpeft.planning.memory import OPTIMIZER_BYTES, Memory, estimate_memory, on_gpu
from fedpeft.planning.preflight import has_answers, problems_of, simulation_problems
from fedpeft.planning.privacy_forecast import PrivacyPlan, plan_privacy
from fedpeft.planning.rule import RulePlan, plan_rule
from fedpeft.planning.traffic import Sizes, measure_sizes
from fedpeft.planning.walk import WalkPlan, plan_walk
from fedpeft.rounds.strategy_table import strategy_problems
from fedpeft.spaces import Space, build_space
from fedpeft.spaces.directions import direction_stream
from fedpeft.stages import build_stages
from fedpeft.training.setting_notes import setting_notes


@dataclass(frozen=True)
class ModelPlan:
    """Base model and PEFT method. `linear` tells whether averaging parameters averages models.

    `device` is what a simulation on this machine would train on.
    """

    path: str
    task: str
    quantization: str
    dtype: str
    method: str
    linear: bool
    trained: int
    total: int
    device: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DataPlan:
    """Rows. Training rows per client are the least, the median and the most; see `FederatedData`."""

    clients: int
    rows: int
    rows_least: int
    rows_median: float
    rows_most: int
    heldout_rows: int
    test_rows: int
    longest_row: int
    max_length: int
    cut_rows: int
    dropped_rows: int
    unused_rows: int
    unused_clients: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedTraffic:
    """Serialised bytes: per client and round, per client over the run (mean), and of all clients in all."""

    down_per_round: int
    up_per_round: int
    up_per_round_if_zero: int
    down_per_client: int
    up_per_client: int
    down_total: int
    up_total: int


@dataclass(frozen=True)
class SpacePlan:
    """How changes are expressed, and what must be known of it.

    `replay_s` is how long one thread here would take from theta_0 to the last state, from the time of a small
    part; None where nothing is rebuilt.
    """

    kind: str
    facts: dict[str, str]
    replay_s: float | None


@dataclass(frozen=True)
class Plan:
    """What a run would cost; a part that cannot be known is None, and `problems` says why.

    `simulation_problems` are what `fedpeft simulate` would refuse and a server would not.
    """

    run: str
    run_digest: str | None
    seed: int | None
    model: ModelPlan | None
    data: DataPlan | None
    space: SpacePlan | None
    rounds: RoundsPlan | None
    privacy: PrivacyPlan | None
    traffic: PlannedTraffic | None
    memory: Memory | None
    problems: tuple[str, ...]
    lora_rule: str | None = None
    groups: tuple[GroupPlan, ...] = ()
    rule: RulePlan | None = None
    simulation_problems: tuple[str, ...] = ()
    walk: WalkPlan | None = None

    def as_json(self) -> dict[str, Any]:
        """Nested tables of plain values; byte counts are integers, times are seconds."""
        return asdict(self)


def make_refused_plan(error: RunFileError) -> Plan:
    """The plan of a run file that cannot be read as one: its problems."""
    return Plan(error.source, None, None, None, None, None, None, None, None, None, error.problems)


def make_plan(run: RunConfig) -> Plan:
    """Load rows and model, measure and add up; every problem on the way is noted and passed over."""
    problems = Problems()
    problems.add(*problems_of(run))
    here = Problems()
    device = here.attempt(lambda: trainable_on(run))
    data, model = load(run, problems)
    sizes = rounds = memory = space = groups = rule = None
    if data is not None:
        problems.add(*_cohort_problems(run, len(data.clients)))
        problems.attempt(lambda: refuse_unknown(run, {client.name for client in data.clients}))
        rule = problems.attempt(lambda: plan_rule(run, {client.name for client in data.clients}))
    if data is not None and model is not None:
        space = problems.attempt(lambda: build_space(run, model))
        problems.attempt(lambda: direction_stream(run, model))
        sizes = None if space is None else _sizes(run, Loaded(data, model), space, problems)
        memory = _memory(run, model, data)
        if memory is not None and device is not None and device.type != "cpu":
            memory = on_gpu(memory, run)
        problems.attempt(lambda: refuse_idle(run, trainable_parameters(model)))
        if space is not None and run.groups and not problems.lines:
            groups = problems.attempt(lambda: plan_groups(run, Loaded(data, model), space, build_stages(run)))
    if data is not None:
        rounds = _rounds(run, data, sizes, problems)
    walk = None
    if data is not None and model is not None and rounds is not None and not problems.lines:
        walk = plan_walk(run, data, model, rounds)
    return Plan(
        run=run.run.name,
        run_digest=run_digest(run),
        seed=run.run.seed,
        model=None if model is None else _model(run, model, str(device or run.model.device)),
        data=None if data is None else _data(run, data),
        space=None if space is None else SpacePlan(space.kind, dict(space.facts()), space.replay_s()),
        rounds=rounds,
        privacy=problems.attempt(lambda: plan_privacy(run, rounds)),
        traffic=_traffic(sizes, rounds),
        memory=memory,
        problems=problems.lines,
        lora_rule=run.federation.lora_rule,
        groups=groups or (),
        rule=rule,
        walk=walk,
        simulation_problems=(*simulation_problems(run), *here.lines),
    )


def _model(run: RunConfig, model: nn.Module, device: str) -> ModelPlan:
    trained, total = count_parameters(model)
    section, method = run.model, run.peft.method
    linear = with_options(METHODS[method], run.peft.options).linear_in_trained
    held = (section.path, section.task, section.quantization, section.dtype)
    return ModelPlan(
        *held, method, linear, trained, total, device, (*setting_notes(run), *coverage_notes(model, run.peft))
    )


def _data(run: RunConfig, data: FederatedData) -> DataPlan:
    rows = [len(client.train) for client in data.clients]
    return DataPlan(
        clients=len(rows),
        rows=sum(rows),
        rows_least=min(rows),
        rows_median=median(rows),
        rows_most=max(rows),
        heldout_rows=sum(len(client.heldout) for client in data.clients),
        test_rows=len(data.test),
        longest_row=int(data.rows.lengths.max()),
        max_length=run.data.max_length,
        cut_rows=data.cut_rows,
        dropped_rows=data.dropped_rows,
        unused_rows=data.unused_rows,
        unused_clients=data.unused_clients,
        notes=data.notes,
    )


def _cohort_problems(run: RunConfig, clients: int) -> list[str]:
    """What is wrong with cohort and strategy, now that the number of clients is known."""
    problems = Problems()
    federation = run.federation
    problems.attempt(
        lambda: problems.add(
            *strategy_problems(federation.strategy, cohort_size(federation.sampling, clients))
        )
    )
    return list(problems.lines)


def _sizes(run: RunConfig, loaded: Loaded, space: Space, problems: Problems) -> Sizes | None:
    return problems.attempt(lambda: measure_sizes(run, loaded, space, build_stages(run)))


def _memory(run: RunConfig, model: nn.Module, data: FederatedData) -> Memory | None:
    """Of the clients that need most; None if an optimiser or metric is unknown, which the problems say."""
    ignored = Problems()
    metrics = ignored.attempt(
        lambda: metrics_of(run.model.task, run.evaluation.metrics, answers=has_answers(run))
    )
    parts = [run, *(run.of_group(group) for group in run.groups if not group.own_model)]
    if metrics is None or any(part.training.optimizer not in OPTIMIZER_BYTES for part in parts):
        return None
    return ignored.attempt(
        lambda: max(
            (estimate_memory(part, model, data, metrics) for part in parts), key=lambda memory: memory.peak
        )
    )


def _rounds(
    run: RunConfig, data: FederatedData, sizes: Sizes | None, problems: Problems
) -> RoundsPlan | None:
    rows = {client.name: len(client.train) for client in data.clients}
    down, up = (sizes.down, sizes.up) if sizes is not None else (0, 0)
    drawn = problems.attempt(lambda: draw_rounds(run, rows, bytes_down=down, bytes_up=up))
    if drawn is None:
        return None
    problems.add(*drawn[1])
    return drawn[0]


def _traffic(sizes: Sizes | None, rounds: RoundsPlan | None) -> PlannedTraffic | None:
    if sizes is None or rounds is None:
        return None
    down, up = sizes.down * rounds.exchanges, sizes.up * rounds.exchanges
    each = rounds.clients
    return PlannedTraffic(sizes.down, sizes.up, sizes.up_zero, round(down / each), round(up / each), down, up)
