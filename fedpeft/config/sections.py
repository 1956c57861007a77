"""The run file: one frozen model per section, every key with its unit and its default.

A run file is TOML; `load_run` (in `fedpeft.config.run_file`) reads it into a `RunConfig`. Names of methods,
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

from fedpeft.config.run_identity import identity_text


def unit(name: str) -> Any:
    """Return an annotation that says a number's unit, for the reference and the JSON schema."""
    return Field(json_schema_extra={"unit": name})


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


Encoding = Annotated[str, AfterValidator(_encoding)]
Separator = Annotated[str, Field(min_length=1, max_length=1)]
Quoting = Literal["csv", "none"]
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


def kind_or(section: type[BaseModel]) -> BeforeValidator:
    """Let a bare name stand for a table of a section with only `kind`: strategy = "fedavg"."""
    return BeforeValidator(_kind_table, json_schema_input_type=str | section)


def _kind_table(value: object) -> object:
    return {"kind": value} if isinstance(value, str) else value


HUB_MODEL = "hub:"
"""Before a base model's name: it is looked for on the hub and in its cache, never as a folder."""

OWN_MODEL = "own:"
"""In place of a base model's path, in what a device is told: its owner says where its copy lies."""


class RunSection(Section):
    """Who the run is: its name, its seed and how many rounds it lasts."""

    name: Annotated[str, Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="Name of the run, its folder and its line in lists."
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Seed that everything random follows from, except the noise and coins of private runs."
    )
    rounds: Annotated[Count, unit("rounds")] = Field(description="How many rounds the run lasts.")


class ModelSection(Section):
    """The frozen base model that every client holds."""

    path: Annotated[str, Field(min_length=1)] = Field(
        "embedded",
        description=(
            "The base model: a folder (relative to the run file), a name on the hub,"
            " 'package:NAME/FOLDER', or 'embedded' for the small model that ships with fedpeft."
        ),
    )
    task: Literal["causal-lm", "sequence-classification"] = Field(
        "causal-lm", description="What is learned; the base model gets a head for it where it has none."
    )
    quantization: Literal["none", "int8", "nf4", "fp4", "rtn8", "rtn4"] = Field(
        "none", description="How the frozen weights are held."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type of the frozen weights; trained parameters are always float32."
    )
    double_quantization: bool | None = Field(
        None, description="For nf4 and fp4: quantise the scales too. Default: true."
    )
    compute_dtype: Literal["float32", "bfloat16"] | None = Field(
        None,
        description="Type in which products with quantised weights are computed. Default: that of dtype.",
    )
    group_size: Annotated[int, Field(ge=2), unit("columns")] | None = Field(
        None, description="For rtn8 and rtn4: columns that share one scale. Default: a whole row."
    )
    keep_modules: tuple[str, ...] = Field(
        (),
        description="Modules whose weights are not quantised, by name or the end of it; the head never is.",
    )
    device: DeviceName = Field(
        "auto",
        description=(
            "What a simulation computes on, and a server's evaluation: 'auto' (the first CUDA device,"
            " else the CPU), 'cpu', 'cuda' or 'cuda:N'. Agents choose their own."
        ),
    )

    @model_validator(mode="after")
    def _check_quantisation(self) -> ModelSection:
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

    method: str = Field(
        "lora",
        description=(
            "The PEFT method. Further keys of this table are its options, by the names that peft gives"
            " them (r, lora_alpha, target_modules ...)."
        ),
    )


class PartitionerSection(Section):
    """How the rows of one data set are dealt to clients.

    iid, size-skewed kinds (linear, square, exponential), dirichlet(alpha, by),
    pathological(classes_per_client, by), shard(by, shards_per_client), natural(by): one client per value of a
    column; files: one file, one client.
    """

    kind: Literal[
        "iid", "linear", "square", "exponential", "dirichlet", "pathological", "shard", "natural", "files"
    ] = Field("iid", description="How rows are dealt to clients.")
    clients: Annotated[Count, unit("clients")] | None = Field(
        None,
        description=(
            "How many clients there are; for natural and files the largest so many. Default: every value"
            " or file; other kinds need it."
        ),
    )
    by: str | None = Field(
        None,
        description=(
            "Field of a row that dirichlet, pathological, shard and natural go by. Default: none; they"
            " need it."
        ),
    )
    alpha: Annotated[PositiveFloat, unit("concentration")] | None = Field(
        None,
        description=(
            "For dirichlet: the smaller, the more clients differ. Default: none; it is needed there."
        ),
    )
    classes_per_client: Annotated[Count, unit("values of by")] | None = Field(
        None,
        description=(
            "For pathological: how many values of the field each client holds. Default: none; it is"
            " needed there."
        ),
    )
    shards_per_client: Annotated[Count, unit("shards")] | None = Field(
        None, description="For shard: how many shards each client holds. Default: none; it is needed there."
    )
    min_rows: Annotated[Count, unit("rows")] = Field(1, description="Fewest rows that a client may hold.")
    exclude: tuple[str | int, ...] = Field(
        (), description="Values of the field in by that are no client, such as a published test split."
    )

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

    train: str | tuple[str, ...] = Field(
        "embedded",
        description=(
            "Training rows: a file, a folder, a glob, a list of these,"
            " 'datasets:OWNER/NAME[/CONFIG][:SPLIT]', or 'embedded'. Agents have their own rows instead."
        ),
    )
    test: str | tuple[str, ...] | None = Field(
        None,
        description=(
            "Rows that every evaluation of the global model is on, in the same forms. Default: the"
            " clients' held-out rows together."
        ),
    )
    prompt: str | None = Field(
        None,
        description=(
            "Template of what a causal language model reads, with {field} for a row's fields; no loss on"
            " it. Default: none."
        ),
    )
    answer: str | None = Field(
        None, description="Template of what it is to write; the loss is on this part. Default: none."
    )
    text: str | None = Field(
        None,
        description=(
            "Template of a whole text: causal language models learn all of it, classifiers read it."
            " Default: none."
        ),
    )
    label: str | None = Field(
        None, description="For classifiers: the field that holds the class. Default: none; they need it."
    )
    labels: tuple[str | int, ...] | dict[str, int] | None = Field(
        None,
        description=(
            "Classes in order, or a table from a field's value to the class's number. Default: the sorted"
            " distinct values."
        ),
    )
    filter: dict[str, str | int | float | bool] | None = Field(
        None, description="Keep the rows whose fields equal these. Default: all rows."
    )
    user: str | None = Field(
        None,
        description=(
            "Field that says whose row it is: record-level privacy then protects persons. Default: each"
            " row by itself."
        ),
    )
    explode: str | None = Field(
        None,
        description=(
            "Field that holds a list, of which each item becomes a row, before filter and limit. Default:"
            " none."
        ),
    )
    limit: Annotated[Count, unit("rows")] | None = Field(
        None,
        description="At most so many training rows, the first ones; refused under privacy. Default: all.",
    )
    test_filter: dict[str, str | int | float | bool] | None = Field(
        None, description="As filter, for the rows of test. Default: all rows."
    )
    test_limit: Annotated[Count, unit("rows")] | None = Field(
        None, description="As limit, for the rows of test. Default: all."
    )
    encoding: Encoding | None = Field(
        None,
        description=(
            "Encoding of text files, such as 'utf-8' or 'windows-1252'. Default: found out from each file."
        ),
    )
    separator: Separator | None = Field(
        None, description="Sign between the columns of CSV and TSV files. Default: found out from each file."
    )
    quoting: Quoting | None = Field(
        None,
        description=(
            "For CSV and TSV files: 'csv' reads quotation marks as marks around values, 'none' as signs"
            " like others. Default: found out from each file."
        ),
    )
    max_length: Annotated[int, Field(ge=2), unit("tokens")] = Field(
        512, description="Longest row; longer ones are cut, and the run says how many."
    )
    control_tokens: bool = Field(
        False,
        description=(
            "Turn control tokens that are written in a row's fields into real ones; otherwise they stay text."
        ),
    )
    heldout: Annotated[float, Field(ge=0.0, lt=1.0), unit("share")] = Field(
        0.1,
        description=(
            "Share of each client's rows that is kept for its own evaluation, each row by the seed and"
            " what it says."
        ),
    )
    partitioner: PartitionerSection = Field(
        PartitionerSection(kind="iid", clients=8),
        description="How the rows are dealt to clients; agents hold their own rows.",
    )


class TrainingSection(Section):
    """What a client does with its rows between two messages."""

    kind: Literal["first-order", "zeroth-order", "none"] = Field(
        "first-order",
        description=(
            "Train by gradients, by measured losses alone, or not at all (clients send back what came)."
        ),
    )
    optimizer: str = Field("adamw", description="Optimiser of first-order training.")
    lr: Annotated[PositiveFloat, unit("factor")] = Field(1e-3, description="Learning rate.")
    schedule: str = Field(
        "constant", description="How the learning rate goes over the local steps of a round."
    )
    warmup_steps: Annotated[int, Field(ge=0), unit("local steps")] = Field(
        0, description="Local steps over which the learning rate rises to lr in each round."
    )
    weight_decay: Annotated[NonNegativeFloat, unit("factor")] = Field(
        0.0, description="Weight decay of the optimiser."
    )
    momentum: Annotated[float, Field(ge=0.0, lt=1.0), unit("factor")] = Field(
        0.0, description="Momentum, for optimizer sgd only."
    )
    steps: Annotated[Count, unit("local steps")] | None = Field(
        None,
        description="Local steps per round; takes precedence over epochs. Default: as many as epochs makes.",
    )
    epochs: Annotated[PositiveFloat, unit("epochs")] = Field(
        1.0, description="Passes over a client's rows per round; parts of one count as well."
    )
    batch_size: Annotated[Count, unit("rows")] = Field(
        16, description="Rows of one forward and backward pass."
    )
    gradient_accumulation: Annotated[Count, unit("batches")] = Field(
        1, description="Batches whose gradients make one step."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass: less memory, more time."
    )
    activation_offload: bool = Field(
        False, description="On a GPU: let activations wait for the backward pass in main memory."
    )
    fused_update: bool = Field(
        False,
        description="Move each parameter once its gradient is there, so that no two gradients are held.",
    )
    sampled_layers: Annotated[Count, unit("layers")] | None = Field(
        None, description="Layers that train at a time, drawn by the run's seed and round. Default: all."
    )
    sample_every: Annotated[Count, unit("local steps")] | None = Field(
        None, description="Local steps between two draws of layers. Default: one draw a round."
    )
    projection_rank: Annotated[Count, unit("rank")] = Field(
        8, description="For optimizer galore: size of the subspace of each matrix's gradient."
    )
    projection_every: Annotated[Count, unit("local steps")] = Field(
        50, description="For optimizer galore: local steps between two subspaces."
    )
    projection_scale: Annotated[PositiveFloat, unit("factor")] = Field(
        0.25, description="For optimizer galore: factor of a projected step."
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="Type of the forward and backward pass.")
    max_grad_norm: Annotated[PositiveFloat, unit("L2 norm")] | None = Field(
        None, description="Clip the gradient of each step's batch to this. Default: no clipping."
    )
    rule: str = Field("zo-sgd", description="For zeroth order: how a step measures and moves.")
    radius: Annotated[PositiveFloat, unit("weight")] = Field(
        1e-3, description="For zeroth order: how far each weight is moved to measure the loss."
    )
    queries: Annotated[Count, unit("directions")] = Field(
        1, description="For zeroth order: directions per step, averaged."
    )
    max_scalar: Annotated[PositiveFloat, unit("directional derivative")] | None = Field(
        None, description="For zeroth order: cut directional derivatives to this size. Default: no bound."
    )
    density: Annotated[float, Field(gt=0.0, le=1.0), unit("share")] = Field(
        0.25,
        description=(
            "For rule sparse: share of each tensor's weights that move, those that are smallest at the start."
        ),
    )
    layers_below: Annotated[int, Field(ge=0), unit("layers")] | None = Field(
        None,
        description=(
            "For rule hybrid: how many of the first layers train by zeroth order. Default: none; the rule"
            " needs it."
        ),
    )
    lr_above: Annotated[PositiveFloat, unit("factor")] | None = Field(
        None, description="For rule hybrid: learning rate of the first-order layers. Default: lr."
    )


class SpaceSection(OpenSection):
    """How a local change is expressed."""

    kind: str = Field(
        "adapter-delta",
        description=(
            "How a local change is expressed as named arrays. Further keys of this table are the space's"
            " options."
        ),
    )


class StageSection(OpenSection):
    """One step on the way from client to server."""

    kind: str = Field(
        description="What the stage does with an update. Further keys of this table are its options."
    )


class SamplingSection(Section):
    """Who is asked each round: a fixed share, a fixed number, or each client by its own coin (Poisson)."""

    kind: Literal["all", "fraction", "fixed", "poisson"] = Field(
        "all", description="Who is asked in a round."
    )
    fraction: Annotated[float, Field(gt=0.0, le=1.0), unit("share")] | None = Field(
        None, description="For fraction: share of the clients. Default: none; it is needed there."
    )
    cohort: Annotated[Count, unit("clients")] | None = Field(
        None, description="For fixed: how many clients. Default: none; it is needed there."
    )
    rate: Annotated[float, Field(gt=0.0, le=1.0), unit("probability")] | None = Field(
        None, description="For poisson: each client's chance to be asked. Default: none; it is needed there."
    )

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

    kind: str = Field(
        "fedavg",
        description=(
            "How updates become one change of the global state. Further keys of this table are the"
            " strategy's options (eta, beta_1, num_malicious_nodes, clip_norm ...)."
        ),
    )
    geometry: Literal["entries", "product"] | None = Field(
        None,
        description=(
            "For robust strategies: measure and combine the entries of updates, or the products B A of"
            " LoRA's factors. Default: products where LoRA trains both factors and the strategy measures"
            " distances, else entries."
        ),
    )


class AttackSection(OpenSection):
    """Hostile clients, in a simulation: who they are, what they do (`kind`), and their attack's options."""

    kind: str = Field(
        description="What hostile clients do. Further keys of this table are the attack's options."
    )
    fraction: Annotated[float, Field(gt=0.0, lt=1.0), unit("share")] | None = Field(
        None,
        description=(
            "Share of the clients that is hostile, drawn from the run's seed. Default: those in clients."
        ),
    )
    clients: tuple[str, ...] = Field((), description="The hostile clients by name, in place of fraction.")

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

    examples_per_s: Annotated[PositiveFloat, unit("rows/s")] = Field(
        100.0, description="Median speed of the clients' training."
    )
    speed_sigma: Annotated[NonNegativeFloat, unit("log")] = Field(
        0.0, description="Spread of the speeds, which are lognormal and drawn once per run; 0: all equal."
    )
    bytes_per_s: Annotated[PositiveFloat, unit("bytes/s")] = Field(
        1e6, description="Speed of transfers, down and up."
    )
    latency_s: Annotated[NonNegativeFloat, unit("s")] = Field(
        0.1, description="Time that passes beside training and upload."
    )
    availability: Annotated[float, Field(gt=0.0, le=1.0), unit("probability")] = Field(
        1.0, description="Each client's chance to be there in a round."
    )
    dropout: Annotated[float, Field(ge=0.0, lt=1.0), unit("probability")] = Field(
        0.0, description="Each client's chance to vanish after it was asked."
    )


class StalenessSection(OpenSection):
    """How much less an update counts the older the state it started from; options belong to the kind."""

    kind: str = Field(
        "polynomial",
        description=(
            "How an update's weight falls with its staleness. Further keys of this table are its options."
        ),
    )


class BufferSection(Section):
    """Mode 'buffered': clients work all the time, and a round ends as soon as `size` updates are in.

    An update's staleness is the number of rounds that ended between the state it started from and itself.
    """

    size: Annotated[Count, unit("updates")] = Field(description="Updates of one round.")
    concurrency: Annotated[Count, unit("clients")] = Field(description="Clients at work at a time.")
    max_staleness: Annotated[int, Field(ge=0, le=1000), unit("rounds")] = Field(
        10, description="Work that started from a state older than this is given up."
    )
    staleness_weight: Annotated[StalenessSection, kind_or(StalenessSection)] = Field(
        StalenessSection(), description="How much less an update counts the older the state it started from."
    )


class PruningSection(Section):
    """HetLoRA's self-pruning: a client gives up its last ranks once they shrink while it trains."""

    keep: Annotated[float, Field(gt=0.0, lt=1.0), unit("share")] = Field(
        0.9, description="Share of a client's ranks that stays once its last ranks shrink."
    )
    penalty: Annotated[NonNegativeFloat, unit("factor")] = Field(
        0.01, description="Factor, in the training loss, of the norms of the last ranks."
    )


class FederationSection(Section):
    """Cohort, deadline and how replies become one change."""

    mode: Literal["synchronous", "buffered"] = Field(
        "synchronous",
        description=(
            "Rounds with a cohort each, or buffered rounds in which clients work all the time (FedBuff)."
        ),
    )
    buffer: BufferSection | None = Field(None, description="Of mode buffered, which needs it. Default: none.")

    strategy: Annotated[StrategySection, kind_or(StrategySection)] = Field(
        StrategySection(), description="How updates become one change of the global state."
    )
    sampling: Annotated[SamplingSection, kind_or(SamplingSection)] = Field(
        SamplingSection(), description="Who is asked in a round."
    )
    weighting: Literal["examples", "uniform"] = Field(
        "examples", description="Let an update count by its client's number of rows, or each the same."
    )
    quorum: Annotated[Fraction, unit("share")] = Field(
        0.5, description="Share of the asked clients (or of the buffer) that must answer, else the run stops."
    )
    over_selection: Annotated[NonNegativeFloat, unit("share")] = Field(
        0.0, description="Ask (1 + this) times the cohort and keep the first to answer."
    )
    deadline_s: Annotated[PositiveFloat, unit("s")] | None = Field(
        None,
        description=(
            "Longest time of a round, or in mode buffered of one client's work; the clock's seconds,"
            " without a clock real ones. Default: none."
        ),
    )
    clock: ClockSection | None = Field(
        None,
        description=(
            "The virtual clock of a simulation. Default: none; every client is as quick as it is and"
            " always there."
        ),
    )
    quantum_exponent: Annotated[int, Field(ge=-60, le=0), unit("power of 2")] = Field(
        -36, description="Sums of floats are exact in units of 2 to this power."
    )
    lora_rule: str | None = Field(
        None,
        description=(
            "How clients' LoRA factors become the next ones. Default: averaged entry by entry, and the"
            " error of that is not measured."
        ),
    )
    residual_rank: Annotated[Count, unit("rank")] | None = Field(
        None,
        description=(
            "For lora_rule flora and exact-residual: most ranks kept of what the factors cannot hold."
            " Default: as many as it takes."
        ),
    )
    self_pruning: PruningSection | None = Field(
        None,
        description=(
            "For lora_rule hetlora: let clients give up ranks by themselves. Default: they keep them."
        ),
    )

    @model_validator(mode="after")
    def _check_buffer(self) -> FederationSection:
        if (self.mode == "buffered") != (self.buffer is not None):
            wanted = "give its size and concurrency" if self.buffer is None else "set mode = 'buffered'"
            raise ValueError(f"mode '{self.mode}' and [federation.buffer] don't go together; {wanted}")
        return self

    attack: AttackSection | None = Field(
        None, description="Hostile clients, in simulations only. Default: all clients are honest."
    )


MAX_DELTA = 1e-2
"""Deltas from here on are refused: publishing one unit in a hundred as it is would keep such a promise."""


class PrivacyPromise(Section):
    """What every kind of differential privacy says: how much noise, and how much may be spent in all.

    `seeded` draws noise and secret coins from the run's seed, so that a simulated experiment repeats itself.
    Whoever knows the seed can subtract that noise: it protects nobody, and deployed runs refuse it.
    """

    noise_multiplier: Annotated[PositiveFloat, unit("ratio")] = Field(
        description="Standard deviation of the noise over the clipping bound."
    )
    target_delta: Annotated[float, Field(gt=0.0, lt=MAX_DELTA), unit("probability")] = Field(
        description="Delta of the promise; below one over the number of protected units.."
    )
    max_epsilon: Annotated[PositiveFloat, unit("epsilon")] = Field(
        description="The run ends before the round that would exceed it."
    )
    seeded: bool = Field(
        False,
        description=(
            "Draw noise and secret coins from the run's seed: repeatable experiments that protect nobody,"
            " refused outside of simulations."
        ),
    )


class ClientLevelPrivacy(PrivacyPromise):
    """Noise at the server on the sum of clipped updates: the models hide whether a client took part.

    `clip_norm` bounds an update's L2 norm, in the space's own unit: parameters, or quanta where updates are
    integers. With `target_quantile` it is only the first bound, and later ones follow that quantile of the
    clients' norms; `count_std` is the noise on the count that this takes (default: a twentieth of the
    expected cohort, at least `noise_multiplier`).
    """

    kind: Literal["client-level"] = Field(
        description="Which promise is made: noise at the server hides whether a client took part."
    )
    clip_norm: Annotated[PositiveFloat, unit("L2 norm")] = Field(
        description=(
            "Bound of an update, in the space's own unit (parameters, or quanta of integer spaces); the"
            " first bound where target_quantile is given.."
        )
    )
    target_quantile: Annotated[float, Field(gt=0.0, lt=1.0), unit("share")] | None = Field(
        None,
        description="Let the bound follow this quantile of the clients' norms. Default: the bound is fixed.",
    )
    clip_learning_rate: Annotated[PositiveFloat, unit("factor")] | None = Field(
        None, description="How quickly the bound follows. Default: 0.2."
    )
    count_std: Annotated[PositiveFloat, unit("clients")] | None = Field(
        None,
        description=(
            "Standard deviation of the noise on the count that an adaptive bound takes. Default: a"
            " twentieth of the expected cohort, at least noise_multiplier."
        ),
    )
    max_weight: Annotated[Count, unit("rows")] | None = Field(
        None,
        description=(
            "With federation.weighting examples: larger weights are cut to it. Default: none; that"
            " weighting needs it."
        ),
    )

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

    kind: Literal["record-level"] = Field(
        description=(
            "Which promise is made: noise in every local step hides any one row, or with data.user any"
            " one person."
        )
    )
    max_grad_norm: Annotated[PositiveFloat, unit("L2 norm")] = Field(
        description=(
            "Bound of what one record adds to a step: its gradient, or its directional derivatives.."
        )
    )
    sample_rate: Annotated[float, Field(gt=0.0, le=1.0), unit("probability")] = Field(
        description="Each record's chance to enter a local step."
    )
    expected_batch_size: Annotated[PositiveFloat, unit("records")] = Field(
        description=(
            "Public number that noised sums are divided by, in place of the private number of rows in a step."
        )
    )


class LocalPrivacy(PrivacyPromise):
    """Noise on the client before anything leaves: the server need not be trusted.

    `clip_norm` bounds an update's L2 norm, in the space's own unit.
    """

    kind: Literal["local"] = Field(
        description=(
            "Which promise is made: noise on the client hides what its update says, from the server too."
        )
    )
    clip_norm: Annotated[PositiveFloat, unit("L2 norm")] = Field(
        description="Bound of an update, in the space's own unit."
    )


PrivacySection = ClientLevelPrivacy | RecordLevelPrivacy | LocalPrivacy


class EvaluationSection(Section):
    """What is measured, on what and how often."""

    metrics: tuple[str, ...] = Field(
        (),
        description=(
            "What is measured. Default: exact-match for prompts with answers, accuracy for classifiers."
        ),
    )
    every: Annotated[Count, unit("rounds")] = Field(1, description="Rounds between two evaluations.")
    batch_size: Annotated[Count, unit("rows")] = Field(32, description="Rows of one forward pass.")
    max_new_tokens: Annotated[Count, unit("tokens")] = Field(
        64, description="Longest text that is generated for metrics that need one."
    )
    max_examples: Annotated[Count, unit("rows")] | None = Field(
        None,
        description=(
            "At most so many rows of the test set, and of each client's held-out rows, the first ones."
            " Default: all."
        ),
    )
    plug_into: str | None = Field(
        None,
        description=(
            "Folder of the full model of an emulator, for whoever holds the run; others lack it. Default:"
            " none."
        ),
    )
    baselines: bool = Field(
        False,
        description=(
            "Measure also the base model, each client alone, and a model of the pooled data with the same"
            " budget."
        ),
    )
    bootstrap: Annotated[Count, unit("resamples")] = Field(
        1000, description="Resamples for the 95% intervals."
    )


class OutputSection(Section):
    """Beside the standard files: extra sinks."""

    tensorboard: bool = Field(False, description="Write TensorBoard events too; takes the extra tensorboard.")
    keep_checkpoints: Annotated[Count, unit("checkpoints")] | None = Field(
        None, description="The newest so many checkpoints stay. Default: one per round."
    )
    sinks: tuple[str, ...] = Field(
        (), description="Further places that receive the run's rows, by the names that plugins give them."
    )


class GroupSection(Section):
    """Clients that differ from the rest of the run, by name, with the keys in which they do.

    A table is laid over the run's own section of that name. One with a `kind` of its own starts from the
    defaults instead, since other kinds take other keys; so do the keys that belong to a quantisation.
    """

    clients: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="Names of the group's clients."
    )
    training: dict[str, Any] = Field({}, description="Keys that differ from [training].")
    model: dict[str, Any] = Field(
        {}, description="Keys that differ from [model]: quantization and its keys, dtype."
    )
    peft: dict[str, Any] = Field({}, description="Keys that differ from [peft]: r, lora_alpha.")
    trains: tuple[str, ...] = Field(
        (),
        description=(
            "Modules that its clients train, by name or a part of it. Default: all that the method trains."
        ),
    )

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

    run: RunSection = Field(description="Who the run is.")
    model: ModelSection = Field(ModelSection(), description="The frozen base model that every client holds.")
    peft: PeftSection = Field(
        PeftSection(), description="What is trained of it: a PEFT method and its options."
    )
    data: DataSection = Field(
        DataSection(),
        description="Where the rows come from, how a row becomes text, and who holds which rows.",
    )
    training: TrainingSection = Field(
        TrainingSection(), description="What a client does with its rows between two messages."
    )
    space: Annotated[SpaceSection, kind_or(SpaceSection)] = Field(
        SpaceSection(), description="How a local change is expressed."
    )
    stages: tuple[StageSection, ...] = Field(
        (),
        description=(
            "What happens to an update on its way from client to server, in this order. Default: nothing."
        ),
    )
    downlink: StageSection | None = Field(
        None, description="One compressing stage for the state's way down. Default: whole states."
    )
    federation: FederationSection = Field(
        FederationSection(), description="Cohort, deadline and how replies become one change."
    )
    privacy: Annotated[PrivacySection, Field(discriminator="kind")] | None = Field(
        None, description="Differential privacy, with a budget. Default: none."
    )
    evaluation: EvaluationSection = Field(
        EvaluationSection(), description="What is measured, on what and how often."
    )
    output: OutputSection = Field(OutputSection(), description="Beside the standard files.")
    groups: tuple[GroupSection, ...] = Field(
        (), description="Clients that differ from the rest of the run. Default: all are alike."
    )

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
            tables[name] = {**_inherit(name, tables[name], keys), **keys}
        return RunConfig.model_validate(tables)


_KIND_KEYS: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "training": ("kind", None),
    "model": ("quantization", ("double_quantization", "compute_dtype", "group_size", "keep_modules")),
}
"""Section to the key whose change makes others meaningless, and these; None: all of them."""


def _inherit(section: str, own: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """What of the run's section stays where a group lays `keys` over it."""
    kind, lost = _KIND_KEYS.get(section, ("", ()))
    if not kind or keys.get(kind, own[kind]) == own[kind]:
        return own
    return {} if lost is None else {key: value for key, value in own.items() if key not in lost}
