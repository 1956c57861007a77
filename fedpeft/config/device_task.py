"""What a device is told of a run: a type of its own, which has no place for what a device must not be told.

A run file is written by a submitter for a server, and names the server's files. Agents get a `DeviceTask`
that the server derives from it. It holds numbers, names from this project's tables, names of modules and of
the fields of a row, templates made of these, and labels. It holds no path and no library, and no string
outside `data` is more than a plain name, so that none is an expression either. The base model is named as the
hub does, or not at all: then the device's owner says where its copy lies.

A device task is its text: its digest is over that text, names the run on the wire, in states and in updates,
and is what the owner's policy lets in. What a device computes with is read from the same text.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from fedpeft.config.run_file import validation_problems
from fedpeft.config.run_identity import identity_digest, identity_text, read_identity
from fedpeft.config.sections import (
    HUB_MODEL,
    OWN_MODEL,
    BufferSection,
    Count,
    Fraction,
    NonNegativeFloat,
    PeftSection,
    PositiveFloat,
    PrivacySection,
    PruningSection,
    RunConfig,
    RunSection,
    SamplingSection,
    Section,
    SpaceSection,
    StageSection,
    StrategySection,
    TrainingSection,
    kind_or,
)
from fedpeft.errors import RunFileError

MAX_BYTES = 512 * 1024  # of a task's text
EMBEDDED = "embedded"

_SOURCE, _RUN_FILE = "task of a device", "run file"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,95})?")
_DEEPEST = 8  # tables within tables
_WORD_LENGTH, _TEXT_LENGTH = 256, 16_384  # characters of a field's name or a label, and of a template

FieldName = Annotated[str, Field(min_length=1, max_length=_WORD_LENGTH)]
Template = Annotated[str, Field(max_length=_TEXT_LENGTH)]
Label = Annotated[str, Field(max_length=_WORD_LENGTH)] | int


class DeviceModel(Section):
    """The base model: its name on the hub, "embedded", or none, and how it is held."""

    name: Annotated[str, Field(pattern=rf"^({_HUB_NAME.pattern})?$")] = EMBEDDED
    task: Literal["causal-lm", "sequence-classification"] = "causal-lm"
    quantization: Literal["none", "int8", "nf4", "fp4", "rtn8", "rtn4"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    double_quantization: bool | None = None
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    group_size: Annotated[int, Field(ge=2)] | None = None
    keep_modules: tuple[str, ...] = ()


class DeviceData(Section):
    """How a row of the owner's becomes text; where the rows are is the owner's to say."""

    prompt: Template | None = None
    answer: Template | None = None
    text: Template | None = None
    label: FieldName | None = None
    labels: tuple[Label, ...] | dict[FieldName, int] | None = None
    filter: dict[FieldName, Annotated[str, Field(max_length=_TEXT_LENGTH)] | int | float | bool] | None = None
    user: FieldName | None = None
    explode: FieldName | None = None
    limit: Count | None = None
    max_length: Annotated[int, Field(ge=2)] = 512
    control_tokens: bool = False
    heldout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    clients: Count | None = None  # that the run is made for


class DeviceFederation(Section):
    """How updates are weighed and combined, as far as it bears on what a device does and accounts for."""

    mode: Literal["synchronous", "buffered"] = "synchronous"
    buffer: BufferSection | None = None
    strategy: Annotated[StrategySection, kind_or(StrategySection)] = StrategySection()
    sampling: Annotated[SamplingSection, kind_or(SamplingSection)] = SamplingSection()
    weighting: Literal["examples", "uniform"] = "examples"
    quorum: Fraction = 0.5
    over_selection: NonNegativeFloat = 0.0
    deadline_s: PositiveFloat | None = None
    quantum_exponent: Annotated[int, Field(ge=-60, le=0)] = -36
    lora_rule: str | None = None
    residual_rank: Count | None = None
    self_pruning: PruningSection | None = None


class DeviceEvaluation(Section):
    """How a device scores its own held-out rows."""

    batch_size: Count = 32
    max_new_tokens: Count = 64
    max_examples: Count | None = None


class DeviceGroup(Section):
    """Clients that differ from the rest, and in what."""

    clients: Annotated[tuple[str, ...], Field(min_length=1)]
    training: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)
    peft: dict[str, Any] = Field(default_factory=dict)
    trains: tuple[str, ...] = ()


class DeviceTask(Section):
    """One run, as its devices are told of it."""

    run: RunSection
    model: DeviceModel = DeviceModel()
    peft: PeftSection = PeftSection()
    data: DeviceData = DeviceData()
    training: TrainingSection = TrainingSection()
    space: SpaceSection = SpaceSection()
    stages: tuple[StageSection, ...] = ()
    downlink: StageSection | None = None
    federation: DeviceFederation = DeviceFederation()
    privacy: Annotated[PrivacySection, Field(discriminator="kind")] | None = None
    evaluation: DeviceEvaluation = DeviceEvaluation()
    groups: tuple[DeviceGroup, ...] = ()

    @functools.cached_property
    def text(self) -> str:
        """The task as it travels: the text it was read from, if it was."""
        return identity_text(self)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the text: the run's name on the wire."""
        return identity_digest(self.text)

    @functools.cached_property
    def as_run(self) -> RunConfig:
        """The task as what trains takes it: a run without sources, whose digest is the task's.

        Raises:
            RunFileError: the sections contradict each other.
        """
        tables = self.model_dump(exclude={"model": {"name"}, "data": {"clients"}})
        tables["model"]["path"] = _path(self.model.name)
        clients = self.data.clients
        partitioner = {"kind": "iid", "clients": clients} if clients else {"kind": "files"}
        tables["data"] |= {"train": (), "test": None, "partitioner": partitioner}
        run: RunConfig = _validate(RunConfig, tables, _SOURCE)
        run.__dict__["identity"] = self.text
        return run


def device_task(run: RunConfig) -> DeviceTask:
    """Derive what devices are told of a run.

    Raises:
        RunFileError: the run says something that no device is told, such as an expression in place of names.
    """
    part = run.model_dump(
        include={
            "run": True,
            "model": set(DeviceModel.model_fields),
            "peft": True,
            "data": set(DeviceData.model_fields),
            "training": True,
            "space": True,
            "stages": True,
            "downlink": True,
            "federation": set(DeviceFederation.model_fields),
            "privacy": True,
            "evaluation": set(DeviceEvaluation.model_fields),
            "groups": True,
        }
    )
    part["model"]["name"] = _model_name(run.model.path)
    part["data"]["clients"] = run.data.partitioner.clients
    task: DeviceTask = _validate(DeviceTask, part, _RUN_FILE)
    _refuse(task, _RUN_FILE)
    return task


def read_device_task(text: str) -> DeviceTask:
    """Read a task that came from a server; it keeps the text, and so the digest, that came.

    Raises:
        RunFileError: with every problem of the text.
    """
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise RunFileError(_SOURCE, [f"has more than {MAX_BYTES} bytes; it is none"])
    try:
        tables = read_identity(text)
    except (ValueError, RecursionError) as error:
        raise RunFileError(_SOURCE, [f"cannot be read: {error}"]) from error
    task: DeviceTask = _validate(DeviceTask, tables, _SOURCE)
    task.__dict__["text"] = text
    _refuse(task, _SOURCE)
    _ = task.as_run  # sections that contradict each other are found now
    return task


def _validate(model: Any, tables: Mapping[str, Any], source: str) -> Any:
    try:
        return model.model_validate(tables)
    except (ValidationError, RecursionError) as error:
        problems = (
            validation_problems(error) if isinstance(error, ValidationError) else ["tables are too deep"]
        )
        raise RunFileError(source, problems) from error


def _model_name(path: str) -> str:
    """The name by which devices know a base model: by how the path is written, wherever this runs."""
    name = path.removeprefix(HUB_MODEL)
    return name if _HUB_NAME.fullmatch(name) else ""


def _path(name: str) -> str:
    """`model.path` of a device's run: never one that could be a folder of the device."""
    if name == EMBEDDED:
        return EMBEDDED
    return f"{HUB_MODEL}{name}" if name else OWN_MODEL


def _refuse(task: DeviceTask, source: str) -> None:
    """Refuse strings that are no plain names, outside of what is said of rows.

    Raises:
        RunFileError: with each of them.
    """
    tables = task.model_dump(exclude={"model": {"name"}, "data": True})
    problems = [problem for where, value in tables.items() for problem in _problems(where, value, 1)]
    own_keys = DeviceModel.model_fields.keys() - {"name", "task"}
    problems += [
        f"groups.{place}.model.{key}: groups of devices differ in {', '.join(sorted(own_keys))}; remove it"
        for place, group in enumerate(task.groups)
        for key in group.model.keys() - own_keys
    ]
    if problems:
        raise RunFileError(source, problems)


def _problems(where: str, value: Any, depth: int) -> Iterator[str]:
    if depth > _DEEPEST:
        yield f"{where}: tables are nested more than {_DEEPEST} deep; a device takes no such"
    elif isinstance(value, str):
        if not _NAME.fullmatch(value) or ".." in value:
            yield (
                f"{where}: {value[:80]!r} is no plain name; agents take names, such as those of modules, and"
                " neither paths nor expressions: list the names"
            )
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _problems(f"{where} key", str(key), depth)
            yield from _problems(f"{where}.{key}", inner, depth + 1)
    elif isinstance(value, Sequence | set | frozenset):
        for inner in value:
            yield from _problems(where, inner, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where}: {value} is no finite number"
    elif not isinstance(value, bool | int | float | None):
        yield f"{where}: {type(value).__name__} came; a device takes numbers, names, lists and tables"
