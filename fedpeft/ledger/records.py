"""What a run leaves behind, as frozen records: the rows of `metrics.jsonl`, one JSON object a line.

Every row carries `event`; `parse_row` reads a line back. Wall times are the only fields that differ between
two runs of one seed, and they are all named `wall_s`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class Record(BaseModel):
    """A frozen row or a part of one; unknown keys are refused so that a foreign file is noticed."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Score(Record):
    """A metric over `count` examples and its 95% bootstrap interval (low = high = value for one example)."""

    value: float
    low: float
    high: float
    count: int


class Evaluation(Record):
    """One model on one test set.

    `scores` is over all examples; `clients` holds, per metric, each client's own value on its own held-out
    rows.
    """

    scores: dict[str, Score]
    clients: dict[str, dict[str, float]] = {}  # metric -> client -> value


class ClientOutcome(Record):
    """What became of one asked client in one round. Bytes are of the serialised update, not of frames."""

    client: str
    status: Literal["folded", "unavailable", "dropped", "late", "refused", "failed"]
    reason: str = ""
    examples: int = 0
    steps: int = 0
    loss: float | None = None  # mean training loss over the round's local steps
    bytes_up: int = 0
    bytes_down: int = 0
    update_norm: float | None = None  # L2 over the whole update, after the client's stages
    distortion: float | None = None  # relative L2 of what lossy stages sent against what they were given
    cosine: float | None = None  # between the same two
    virtual_s: float | None = None  # when its answer arrived on the virtual clock, from when it was asked
    staleness: int | None = None  # buffered rounds: how many rounds ended while it worked
    rank: int | None = None  # under self-pruning: what its training has left of its adapter's


class TrafficStats(Record):
    """One direction of one round, as means over its transfers; sizes are bytes.

    `stages` has the size of the values as they were ("plain") and after each stage, in order; `message` is
    what went over the socket: values and header. On the way down `stages` is the step that the round made,
    `message` the state that clients were sent before it: whole, or the steps that they lacked.
    """

    stages: tuple[tuple[str, float], ...]
    message: float
    distortion: float | None = None  # relative L2 of what lossy stages sent against what they were given
    cosine: float | None = None  # between the same two


SCALAR_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class Scalars(Record):
    """The integers, other than zero, that the counted clients of a round sent in an exact seed space.

    `quantiles` are at `SCALAR_QUANTILES`, in quanta. `negative` and `positive` count them by size: entry b
    has those from 2**b up to 2**(b + 1); both are of one length.
    """

    count: int
    quantiles: Annotated[tuple[float, ...], Field(min_length=7, max_length=7)]
    negative: tuple[int, ...]
    positive: tuple[int, ...]


class Aggregation(Record):
    """How a round's LoRA factors were combined, and how far that is from the mean of their products.

    `error` is the Frobenius distance between the weights' change that the next adapter makes and the mean of
    the clients' changes, over the norm of that mean, all modules together; `worst` is that of one module
    alone, named `worst_module`.
    """

    rule: str
    error: float
    worst: float
    worst_module: str
    norm: float  # of the mean of products, times their scaling
    residual_rank: int = 0  # of the largest frozen product that is kept beside the factors


class Promise(Record):
    """What a private run promises, as it is to be read beside its epsilon."""

    kind: str
    neighbours: str  # epsilon tells apart two of these at most
    against: str  # whom it protects from
    noise_multiplier: float
    sample_rate: float  # 1: everybody takes part in everything
    target_delta: float
    max_epsilon: float
    seeded: bool  # noise from the run's seed, which protects nobody: an experiment
    measured: bool  # scores are published; without a test set of its own a private run has none to publish


class Started(Record):
    """First row: what the run is."""

    event: Literal["started"] = "started"
    run_name: str
    run_digest: str
    seed: int
    rounds: int
    engine: str
    clients: dict[str, int]  # name -> training rows
    test_examples: int
    test_of_clients: bool = False  # the test rows are those that clients held back: the run names none
    baselines: bool = False  # whether models without federation follow, for comparison
    trainable_parameters: int
    total_parameters: int
    base_digest: str
    device: str = "cpu"  # where this process computes; agents choose for themselves
    cut_rows: int
    labels: tuple[str, ...] = ()  # of a classifier, by class number
    primary_metric: str
    higher_is_better: dict[str, bool]  # for every metric of the run
    privacy: Promise | None = None  # its clients' row counts are 0 then: they are private
    attack: str = ""  # what a simulation's hostile clients do
    attackers: tuple[str, ...] = ()  # who they are
    versions: dict[str, str]


class Round(Record):
    """One finished round. Round 0 is the start: no training, only the evaluation."""

    event: Literal["round"] = "round"
    round: int
    outcomes: tuple[ClientOutcome, ...] = ()
    train_loss: float | None = None  # weighted as the updates are
    state_norm_change: float | None = None  # L2 of the change applied to the global state
    up: TrafficStats | None = None  # clients to server
    down: TrafficStats | None = None  # server to clients
    scalars: Scalars | None = None  # of an exact seed space
    aggregation: Aggregation | None = None  # under federation.lora_rule, where updates may be looked at
    evaluation: Evaluation | None = None
    virtual_s: float | None = None  # length of the round on the virtual clock
    staleness: tuple[int, ...] = ()  # buffered rounds: entry s counts the folded updates of staleness s
    epsilon: float | None = None  # spent so far, this round included, by the account that spent most
    epsilon_cohort: float | None = None  # the same against whoever sees secret cohorts: the sample rate is 1
    joined: tuple[str, ...] = ()  # who may be asked from this round on and not before; others: from the start
    notes: tuple[str, ...] = ()
    wall_s: float = 0.0


class Baseline(Record):
    """A model that was trained otherwise, on the same test set and with the same budget.

    `local` has one evaluation per client that trained alone; the others have one. In offsite tuning the run's
    own scores are the emulator's, `full-model` is the model that it stands for, untrained, and `plugged-in`
    the same with what the run trained.
    """

    event: Literal["baseline"] = "baseline"
    name: Literal["zero-shot", "local", "pooled", "full-model", "plugged-in"]
    evaluations: dict[str, Evaluation]  # client -> evaluation; the single key of the others is their name
    wall_s: float = 0.0


class Finished(Record):
    """Last row: how the run ended."""

    event: Literal["finished"] = "finished"
    rounds: int
    adapter_digest: str
    bytes_up_per_client: float  # mean over clients that were asked at least once, all rounds
    bytes_down_per_client: float
    peak_rss_mib: float | None = None  # largest worker or parent process; a measurement, not reproducible
    peak_device_mib: float | None = None  # of tensors on the GPU of the process that held the rounds
    stopped: str = ""  # why it ended before its last round; empty: it didn't
    wall_s: float = 0.0


Row = Annotated[Started | Round | Baseline | Finished, Field(discriminator="event")]
_ROW: TypeAdapter[Started | Round | Baseline | Finished] = TypeAdapter(Row)


def parse_row(line: str | bytes) -> Started | Round | Baseline | Finished:
    """One line of `metrics.jsonl` as its record.

    Raises:
        pydantic.ValidationError: the line is no row of this version.
    """
    return _ROW.validate_json(line)
