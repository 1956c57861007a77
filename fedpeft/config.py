"""The run file: one frozen model per section, every key with its unit and its default.

A run file is TOML; `load_run` (in `fedpeft.runfile`) reads it into a `RunConfig`. Names of methods,
strategies, stages and the like are checked against their tables when the run is prepared, since a table may
need heavy imports; everything that can be known from the file alone is checked here.
"""

from __future__ import annotations

import codecs
import functools
import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from fedpeft.run_identity import identity_text

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]


def _device_name(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise ValueError(f"{name!r} came; use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    return name


def _encoding(name: str) -> str:
    try:
        codecs.lookup(name)
        "".encode(name)
    except (LookupError, ValueError) as error:
        raise ValueError(f"{name!r} is no encoding; use one such as 'utf-8' or 'windows-1252'") from error
    return name


DeviceName = Annotated[str, AfterValidator(_device_name)]
"""What a model computes on. "auto" is the first CUDA device, or the CPU where there is none."""


class Section(BaseModel):
    """A frozen table of the run file that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class OpenSection(BaseModel):
    """A frozen table whose further keys belong to what `kind` or `method` names, and are checked there."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    @property
    def options(self) -> dict[str, Any]:
        """The keys beyond the declared ones."""
        return dict(self.model_extra or {})


def kind_table(value: object) -> object:
    """Let a bare name stand for a table with only `kind`: strategy = "fedavg"."""
    return {"kind": value} if isinstance(value, str) else value


HUB_MODEL = "hub:"
"""Before a base model's name: it is looked for on the hub and in its cache, never as a folder."""

OWN_MODEL = "own:"
"""In place of a base model's path, in what a device is told: its owner says where its copy lies."""


class RunSection(Section):
    """Who the run is: its name, its seed and how many rounds it lasts."""

    name: Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    rounds: Count


class ModelSection(Section):
    """The frozen base model that every client holds."""

    path: Annotated[str, Field(min_length=1)] = (
        "embedded"  # a folder, a hub name, or the model that ships with us
    )
    task: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    quantization: Literal["none", "int8", "nf4", "fp4", "rtn8", "rtn4"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the frozen weights; trained parameters are float32
    double_quantization: bool | None = None  # nf4, fp4: the scales are quantised too; default true
    compute_dtype: Literal["float32", "bfloat16"] | None = None  # of products with quantised weights
    group_size: Annotated[int, Field(ge=2)] | None = None  # rtn: columns per scale; default a whole row
    keep_modules: tuple[str, ...] = ()  # modules left as they are, by name or its end; the head always is
    device: DeviceName = "auto"  # of a simulation, and of a server's evaluation; agents choose their own

    @model_validator(mode="after")
    def _quantised(self) -> ModelSection:
        takes = {
            "double_quantization": ("nf4", "fp4"),
            "compute_dtype": ("nf4", "fp4", "rtn8", "rtn4"),
            "group_size": ("rtn8", "rtn4"),
            "keep_modules": ("int8", "nf4", "fp4", "rtn8", "rtn4"),
        }
        idle = [
            f"{key} belongs to {', '.join(kinds)}"
            for key, kinds in takes.items()
            if getattr(self, key) not in (None, ()) and self.quantization not in kinds
        ]
        if idle:
            raise ValueError(f"quantization is '{self.quantization}', and {'; '.join(idle)}; remove them")
        return self


class PeftSection(OpenSection):
    """The PEFT method and its own options, by the names `peft` gives them."""

    method: str = "lora"


class PartitionerSection(Section):
    """How the rows of one data set are dealt to clients.

    iid, size-skewed kinds (linear, square, exponential), dirichlet(alpha, by),
    pathological(classes_per_client, by), shard(by, shards_per_client), natural(by): one client per value of a
    column; files: one file, one client.
    """

    kind: Literal[
        "iid", "linear", "square", "exponential", "dirichlet", "pathological", "shard", "natural", "files"
    ] = "iid"
    clients: Count | None = None  # natural and files: at most so many, the largest first; default all
    by: str | None = None
    alpha: PositiveFloat | None = None
    classes_per_client: Count | None = None
    shards_per_client: Count | None = None
    min_rows: Count = 1  # fewest rows a client may hold
    exclude: tuple[str | int, ...] = ()  # values of `by` that are no client (a published test split, say)

    @model_validator(mode="after")
    def _complete(self) -> PartitionerSection:
        needs: dict[str, tuple[str, ...]] = {
            "iid": ("clients",),
            "linear": ("clients",),
            "square": ("clients",),
            "exponential": ("clients",),
            "dirichlet": ("clients", "by", "alpha"),
            "pathological": ("clients", "by", "classes_per_client"),
            "shard": ("clients", "by", "shards_per_client"),
            "natural": ("by",),
            "files": (),
        }
        missing = [key for key in needs[self.kind] if getattr(self, key) is None]
        if missing:
            raise ValueError(f"partitioner '{self.kind}' needs {', '.join(missing)}")
        return self


class DataSection(Section):
    r"""Where the rows come from, how a row becomes text, and who holds which rows.

    Causal language models take `prompt` and `answer` templates (loss on the answer only) or `text` (loss on
    all of it); classifiers take `text` and `label`. Templates are `str.format` style over the row's fields:
    "{instruction}\\n".
    """

    train: str | tuple[str, ...] = (
        "embedded"  # file, folder/glob, "datasets:OWNER/NAME[/CONFIG][:SPLIT]", or "embedded"
    )
    test: str | tuple[str, ...] | None = None  # global test set, same forms; none: the clients' held-out rows
    prompt: str | None = None
    answer: str | None = None
    text: str | None = None
    label: str | None = None  # name of the label field
    labels: tuple[str | int, ...] | dict[str, int] | None = (
        None  # label map; default: the sorted distinct values
    )
    filter: dict[str, str | int | float | bool] | None = None  # keep rows whose fields equal these
    user: str | None = None  # name of the field that says whose row it is, for record-level privacy
    explode: str | None = None  # a field that holds a list: one row per item; before `filter` and `limit`
    limit: Count | None = None  # at most so many training rows, the first ones; refused under privacy
    test_filter: dict[str, str | int | float | bool] | None = None  # rows of `test` whose fields equal these
    test_limit: Count | None = None
    encoding: Annotated[str, AfterValidator(_encoding)] | None = None  # of text files; none: found out
    separator: Annotated[str, Field(min_length=1, max_length=1)] | None = (
        None  # of csv and tsv; none: found out
    )
    quoting: Literal["csv", "none"] | None = None  # of csv and tsv: marks around values, or signs like others
    max_length: Annotated[int, Field(ge=2)] = (
        512  # tokens; longer rows are cut and the number of cut rows reported
    )
    control_tokens: bool = False  # true: control tokens written in a row's fields become real ones
    heldout: Annotated[float, Field(ge=0.0, lt=1.0)] = (
        0.1  # share of rows kept for their client's own evaluation, each by the seed and what it says
    )
    partitioner: PartitionerSection = PartitionerSection(kind="iid", clients=8)


class TrainingSection(Section):
    """What a client does with its rows between two messages."""

    kind: Literal["first-order", "zeroth-order", "none"] = "first-order"  # none: send back what came
    optimizer: str = "adamw"
    lr: PositiveFloat = 1e-3
    schedule: str = "constant"  # constant, linear, cosine, over the round's local steps
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: NonNegativeFloat = 0.0
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0  # sgd only
    steps: Count | None = None  # local steps per round; takes precedence over epochs
    epochs: PositiveFloat = 1.0
    batch_size: Count = 16
    gradient_accumulation: Count = 1
    gradient_checkpointing: bool = False
    activation_offload: bool = False  # on a GPU: activations wait for the backward pass in main memory
    fused_update: bool = False  # a parameter moves once its gradient is there: no two gradients are held
    sampled_layers: Count | None = None  # so many layers train at a time, drawn by the run's seed and round
    sample_every: Count | None = None  # local steps between two draws of layers; default: one draw a round
    projection_rank: Count = 8  # optimizer galore: size of the subspace of each matrix's gradient
    projection_every: Count = 50  # optimizer galore: local steps between two subspaces
    projection_scale: PositiveFloat = 0.25  # optimizer galore: of a projected step
    precision: Literal["fp32", "bf16"] = "fp32"  # of the forward and backward pass
    max_grad_norm: PositiveFloat | None = None  # per step, over the whole batch's gradient
    rule: str = "zo-sgd"  # zeroth order: how a step measures and moves; `fedpeft methods` lists the rules
    radius: PositiveFloat = 1e-3  # zeroth order: each weight is moved by so much to measure the loss
    queries: Count = 1  # zeroth order: directions per step, averaged
    max_scalar: PositiveFloat | None = None  # zeroth order: directional derivatives are cut to this size
    density: Annotated[float, Field(gt=0.0, le=1.0)] = (
        0.25  # rule sparse: share of each tensor's weights that move, the smallest of theta_0
    )
    layers_below: Annotated[int, Field(ge=0)] | None = None  # rule hybrid: layers that are zeroth order
    lr_above: PositiveFloat | None = None  # rule hybrid: of the first-order layers; default lr


class SpaceSection(OpenSection):
    """How a local change is expressed."""

    kind: str = "adapter-delta"


class StageSection(OpenSection):
    """One step on the way from client to server."""

    kind: str


class SamplingSection(Section):
    """Who is asked each round: a fixed share, a fixed number, or each client by its own coin (Poisson)."""

    kind: Literal["all", "fraction", "fixed", "poisson"] = "all"
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    cohort: Count | None = None
    rate: Annotated[float, Field(gt=0.0, le=1.0)] | None = None

    @model_validator(mode="after")
    def _complete(self) -> SamplingSection:
        needed = {"all": None, "fraction": "fraction", "fixed": "cohort", "poisson": "rate"}[self.kind]
        for key in ("fraction", "cohort", "rate"):
            given = getattr(self, key) is not None
            if given != (key == needed):
                raise ValueError(
                    f"sampling '{self.kind}' needs {needed or 'no further key'}; {key} was "
                    + ("given" if given else "not given")
                )
        return self


class StrategySection(OpenSection):
    """A strategy by name, with its own options (eta, beta_1, num_malicious_nodes, clip_norm ...).

    `geometry` is for robust rules: what they measure and combine, the entries of updates, or the products B A
    of LoRA's factors and the entries of what is trained beside them. Default: products where LoRA trains both
    factors and the rule measures distances; entries for rules that look at single entries.
    """

    kind: str = "fedavg"
    geometry: Literal["entries", "product"] | None = None


class AttackSection(OpenSection):
    """Hostile clients, in a simulation: who they are, what they do (`kind`), and their attack's options."""

    kind: str
    fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # so many, drawn from the run's seed
    clients: tuple[str, ...] = ()  # or these, by name

    @model_validator(mode="after")
    def _who(self) -> AttackSection:
        if (self.fraction is None) == (not self.clients):
            came = "neither" if self.fraction is None else "both"
            raise ValueError(f"{came} of fraction and clients came; give one of them")
        return self


class ClockSection(Section):
    """The virtual clock of a simulation: how fast clients are and how often they are away.

    A client's speed is drawn once per run, lognormal around `examples_per_s` with spread `speed_sigma` (0:
    all equal); its upload takes payload bytes over `bytes_per_s`. Each round it is away with `1 -
    availability` and vanishes after being asked with `dropout`.
    """

    examples_per_s: PositiveFloat = 100.0
    speed_sigma: NonNegativeFloat = 0.0
    bytes_per_s: PositiveFloat = 1e6
    latency_s: NonNegativeFloat = 0.1
    availability: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0


class StalenessSection(OpenSection):
    """How much less an update counts the older the state it started from; options belong to the kind."""

    kind: str = "polynomial"  # polynomial (exponent), hinge (slope, after), constant


class BufferSection(Section):
    """Mode 'buffered': clients work all the time, and a round ends as soon as `size` updates are in.

    An update's staleness is the number of rounds that ended between the state it started from and itself.
    """

    size: Count  # updates of one round
    concurrency: Count  # clients at work at a time
    max_staleness: Annotated[int, Field(ge=0, le=1000)] = 10  # rounds; work on an older state is given up
    staleness_weight: Annotated[StalenessSection, BeforeValidator(kind_table)] = StalenessSection()


class PruningSection(Section):
    """HetLoRA's self-pruning: a client gives up its last ranks once they shrink while it trains."""

    keep: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9  # share of a client's ranks that then stays
    penalty: NonNegativeFloat = 0.01  # on the norms of the last ranks, in the training loss


class FederationSection(Section):
    """Cohort, deadline and how replies become one change."""

    mode: Literal["synchronous", "buffered"] = "synchronous"  # buffered: see [federation.buffer]
    buffer: BufferSection | None = None

    strategy: Annotated[StrategySection, BeforeValidator(kind_table)] = StrategySection()
    sampling: Annotated[SamplingSection, BeforeValidator(kind_table)] = SamplingSection()
    weighting: Literal["examples", "uniform"] = "examples"
    quorum: Fraction = 0.5  # share of the asked clients (or buffer) that must answer, else the run stops
    over_selection: NonNegativeFloat = 0.0  # ask (1 + this) times the cohort, keep the first to answer
    # Of one round, or in mode 'buffered' of one client's work; the clock's seconds, without one real ones.
    deadline_s: PositiveFloat | None = None
    clock: ClockSection | None = None
    quantum_exponent: Annotated[int, Field(ge=-60, le=0)] = -36  # float sums are exact in units of 2**this
    lora_rule: str | None = None  # how LoRA factors are averaged; absent: entry by entry, unmeasured
    residual_rank: Count | None = None  # flora, exact-residual: most ranks kept; default: all it takes
    self_pruning: PruningSection | None = None  # hetlora: clients give up ranks by themselves; absent: none

    @model_validator(mode="after")
    def _buffered(self) -> FederationSection:
        if (self.mode == "buffered") != (self.buffer is not None):
            wanted = "give its size and concurrency" if self.buffer is None else "set mode = 'buffered'"
            raise ValueError(f"mode '{self.mode}' and [federation.buffer] don't go together; {wanted}")
        return self

    attack: AttackSection | None = None  # simulations only; absent: all clients are honest


MAX_DELTA = 1e-2
"""Deltas from here on are refused: publishing one unit in a hundred as it is would keep such a promise."""


class PrivacyPromise(Section):
    """What every kind of differential privacy says: how much noise, and how much may be spent in all.

    `seeded` draws noise and secret coins from the run's seed, so that a simulated experiment repeats itself.
    Whoever knows the seed can subtract that noise: it protects nobody, and deployed runs refuse it.
    """

    noise_multiplier: PositiveFloat  # the noise's standard deviation over the clipping bound
    target_delta: Annotated[
        float, Field(gt=0.0, lt=MAX_DELTA)
    ]  # below one over the number of protected units
    max_epsilon: PositiveFloat  # the run ends before the round that would exceed it
    seeded: bool = False


class ClientLevelPrivacy(PrivacyPromise):
    """Noise at the server on the sum of clipped updates: the models hide whether a client took part.

    `clip_norm` bounds an update's L2 norm, in the space's own unit: parameters, or quanta where updates are
    integers. With `target_quantile` it is only the first bound, and later ones follow that quantile of the
    clients' norms; `count_std` is the noise on the count that this takes (default: a twentieth of the
    expected cohort, at least `noise_multiplier`).
    """

    kind: Literal["client-level"]
    clip_norm: PositiveFloat
    target_quantile: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    clip_learning_rate: PositiveFloat | None = None  # of the adaptive bound; default 0.2
    count_std: PositiveFloat | None = None
    max_weight: Count | None = None  # with weighting 'examples': larger weights are cut to it

    @model_validator(mode="after")
    def _adaptive(self) -> ClientLevelPrivacy:
        given = [key for key in ("clip_learning_rate", "count_std") if getattr(self, key) is not None]
        if given and self.target_quantile is None:
            raise ValueError(
                f"{' and '.join(given)} came without target_quantile, which makes clipping adaptive"
            )
        if self.count_std is not None and self.noise_multiplier >= 2.0 * self.count_std:
            raise ValueError(
                f"count_std {self.count_std:g} came and noise_multiplier is {self.noise_multiplier:g}: the"
                f" count alone would cost more than a round; give more than {self.noise_multiplier / 2.0:g}"
            )
        return self


class RecordLevelPrivacy(PrivacyPromise):
    """DP-SGD on each client: its updates hide any one row, or with `data.user` any one person.

    `max_grad_norm` bounds what one record adds to a step: its gradient, or with a zeroth-order trainer its
    directional derivatives. Noised sums are divided by `expected_batch_size`, which is public as the number
    of a client's rows is not.
    """

    kind: Literal["record-level"]
    max_grad_norm: PositiveFloat
    sample_rate: Annotated[float, Field(gt=0.0, le=1.0)]  # each record's chance to enter a local step
    expected_batch_size: PositiveFloat


class LocalPrivacy(PrivacyPromise):
    """Noise on the client before anything leaves: the server need not be trusted.

    `clip_norm` bounds an update's L2 norm, in the space's own unit.
    """

    kind: Literal["local"]
    clip_norm: PositiveFloat


PrivacySection = ClientLevelPrivacy | RecordLevelPrivacy | LocalPrivacy


class EvaluationSection(Section):
    """What is measured, on what and how often."""

    metrics: tuple[
        str, ...
    ] = ()  # default by task: exact-match for prompts with answers, accuracy for classifiers
    every: Count = 1  # rounds
    batch_size: Count = 32
    max_new_tokens: Count = 64  # for metrics that need generated text
    max_examples: Count | None = None  # of the test set, and of each client's held-out rows; the first ones
    plug_into: str | None = None  # the full model of an emulator, for whoever holds the run; others lack it
    baselines: bool = False  # zero-shot, each client alone, pooled data, each with the same budget
    bootstrap: Count = 1000  # resamples for the 95% intervals


class OutputSection(Section):
    """Beside the standard files: extra sinks."""

    tensorboard: bool = False
    keep_checkpoints: Count | None = None  # default: one per round


class GroupSection(Section):
    """Clients that differ from the rest of the run, by name, with the keys in which they do.

    A table is laid over the run's own section of that name. One with a `kind` of its own starts from the
    defaults instead, since other kinds take other keys; so do the keys that belong to a quantisation.
    """

    clients: Annotated[tuple[str, ...], Field(min_length=1)]
    training: dict[str, Any] = {}
    model: dict[str, Any] = {}  # how the base is held: quantization and its keys, dtype
    peft: dict[str, Any] = {}  # r, lora_alpha
    trains: tuple[str, ...] = ()  # modules that its clients train, by name or a part of it; default all

    @property
    def overrides(self) -> dict[str, dict[str, Any]]:
        """Section of the run to what is laid over it."""
        return {"training": self.training, "model": self.model, "peft": self.peft}

    @property
    def own_model(self) -> bool:
        """Whether its clients hold another base, or another adapter on it, than the run says."""
        return bool(self.model or self.peft)


class RunConfig(Section):
    """A whole run file."""

    run: RunSection
    model: ModelSection = ModelSection()
    peft: PeftSection = PeftSection()
    data: DataSection = DataSection()
    training: TrainingSection = TrainingSection()
    space: Annotated[SpaceSection, BeforeValidator(kind_table)] = SpaceSection()
    stages: tuple[StageSection, ...] = ()
    downlink: StageSection | None = (
        None  # one compressing stage for the state's way down; absent: whole states
    )
    federation: FederationSection = FederationSection()
    privacy: Annotated[PrivacySection, Field(discriminator="kind")] | None = None  # absent: none
    evaluation: EvaluationSection = EvaluationSection()
    output: OutputSection = OutputSection()
    groups: tuple[GroupSection, ...] = ()  # clients not named in any train as the sections above say

    @model_validator(mode="after")
    def _sound_groups(self) -> RunConfig:
        named = Counter(client for group in self.groups for client in group.clients)
        twice = sorted(client for client, count in named.items() if count > 1)
        if twice:
            raise ValueError(f"groups: client {twice[0]!r} is named twice; a client is in one group at most")
        for place, group in enumerate(self.groups):
            try:
                self.of_group(group)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, ("groups", place, *first["loc"])))
                known = first["type"] != "extra_forbidden"
                raise ValueError(f"{where}: {first['msg'] if known else 'unknown key; remove it'}") from error
        return self

    @functools.cached_property
    def identity(self) -> str:
        """The text that says which run this is: the one it was read from, if it was. See `run_identity`."""
        return identity_text(self)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Copy the run; with changed sections it is another run, which has an identity of its own."""
        copied = super().model_copy(update=update, deep=deep)
        if update:
            copied.__dict__.pop("identity", None)
        return copied

    @property
    def hides_rows(self) -> bool:
        """Whether what a client sends hides any one row or person: then nothing else may tell either."""
        return isinstance(self.privacy, RecordLevelPrivacy)

    def group_of(self, client: str) -> int | None:
        """Position of the group that names a client; None: no group does."""
        found = (place for place, group in enumerate(self.groups) if client in group.clients)
        return next(found, None)

    def of_client(self, client: str) -> RunConfig:
        """The run as one client takes part in it."""
        place = self.group_of(client)
        return self if place is None else self.of_group(self.groups[place])

    def of_group(self, group: GroupSection) -> RunConfig:
        """The run with a group's keys in place of its own, and without groups.

        Raises:
            ValidationError: a key or value that the section doesn't take.
        """
        tables = self.model_dump(exclude={"groups"})
        for name, keys in group.overrides.items():
            tables[name] = {**_inherited(name, tables[name], keys), **keys}
        return RunConfig.model_validate(tables)


_KIND_KEYS: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "training": ("kind", None),
    "model": ("quantization", ("double_quantization", "compute_dtype", "group_size", "keep_modules")),
}
"""Section to the key whose change makes others meaningless, and these; None: all of them."""


def _inherited(section: str, own: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """What of the run's section stays where a group lays `keys` over it."""
    kind, lost = _KIND_KEYS.get(section, ("", ()))
    if not kind or keys.get(kind, own[kind]) == own[kind]:
        return own
    return {} if lost is None else {key: value for key, value in own.items() if key not in lost}
