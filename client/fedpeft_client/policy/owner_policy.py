"""What the owner of an agent allows. The owner's word wins: a task outside it is refused.

The owner reads why; a server reads which keys speak against the task, and an owner's number only where
`tell_limits` names its key.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from fedpeft.config.device_task import EMBEDDED
from fedpeft.config.sections import MAX_DELTA, DataSection, RunConfig, Section, unit
from fedpeft.data.templates import compile_template
from fedpeft.errors import DataError, PolicyError

DELTA = 1e-5  # of the ledger's epsilons, where the owner names none
MOST_EPSILON = 100.0  # of one run: more hides nothing, so it is no answer to an owner who asks for privacy
Positive = Annotated[float, Field(gt=0.0)]
PrivacyKind = Literal["client-level", "record-level", "local"]


class Policy(Section):
    """The table `[policy]` of client.toml; what is left out is not restricted."""

    base_digests: tuple[str, ...] | None = Field(
        None,
        description=(
            "Fingerprints (hex) of base models; `fedpeft client status` shows that of the one loaded."
            " Default: any."
        ),
    )
    runs: tuple[str, ...] | None = Field(None, description="Names of runs. Default: any.")
    tasks: tuple[str, ...] | None = Field(None, description="Values of model.task. Default: any.")
    methods: tuple[str, ...] | None = Field(None, description="Values of peft.method. Default: any.")
    training: tuple[str, ...] | None = Field(None, description="Values of training.kind. Default: any.")
    spaces: tuple[str, ...] | None = Field(None, description="Values of space.kind. Default: any.")
    stages: tuple[str, ...] | None = Field(
        None, description="Client stages that may be applied; an empty list allows none. Default: any."
    )
    needs_stages: tuple[str, ...] = Field((), description="Client stages that must be applied.")
    models: tuple[str, ...] | None = Field(
        None,
        description=(
            "Names of base models of the hub that a run may have loaded; one that the owner gave (model) and"
            " the embedded one need no name here. Default: any."
        ),
    )
    privacy: tuple[PrivacyKind, ...] | None = Field(
        None,
        description=(
            "A run must promise one of these kinds, with noise that the server does not know."
            " Default: no promise is asked for."
        ),
    )
    user: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None,
        description=(
            "Fields that tell persons apart, one of which a run must protect: under record-level privacy its"
            " data.user is one of these, and a run that protects single rows is refused. Client-level and"
            " local promises protect all that a device holds. Default: any."
        ),
    )
    min_noise_multiplier: Annotated[Positive, unit("ratio")] | None = Field(
        None, description="Least noise multiplier of that promise. Default: any."
    )
    max_run_epsilon: Annotated[Positive, unit("epsilon")] | None = Field(
        None,
        description=(
            "Largest epsilon of that promise, and of this device's own account of the run. Default: any,"
            " and 100 where another key asks for privacy."
        ),
    )
    max_total_epsilon: Annotated[Positive, unit("epsilon")] | None = Field(
        None,
        description=(
            "What all runs on these rows may come to together, by this device's own account; a run without a"
            " promise is refused then. Default: any."
        ),
    )
    max_delta: Annotated[float, Field(gt=0.0, lt=MAX_DELTA), unit("probability")] | None = Field(
        None,
        description=(
            "Delta of that account, and the largest that a run's promise may have. Default: 1e-5 for the"
            " account, and the run file's own rules for a promise."
        ),
    )
    max_memory_mib: Annotated[Positive, unit("MiB")] | None = Field(
        None, description="Memory of the worker; a task that exceeds it is ended. Default: no bound."
    )
    max_task_s: Annotated[Positive, unit("s")] | None = Field(
        None, description="Time of a task; one that exceeds it is ended. Default: no bound."
    )
    max_bytes_per_day: Annotated[int, Field(ge=0), unit("bytes/day")] | None = Field(
        None, description="Traffic up and down together, by UTC days. Default: no bound."
    )
    max_local_steps: Annotated[int, Field(ge=1), unit("local steps")] | None = Field(
        None, description="Local steps of one round. Default: no bound."
    )
    allow_download: bool = Field(
        False, description="Whether a run file may name a model of the hub, which would be fetched."
    )
    needs_confinement: bool = Field(
        False,
        description=(
            "Whether no task is done unless the worker gave up all that it has no use for: files, network,"
            " system calls, privileges."
        ),
    )
    fields: tuple[str, ...] | None = Field(
        None,
        description=(
            "Fields of rows that a run may use: in templates and filters, as label, to explode, to tell"
            " persons apart. Default: any."
        ),
    )
    allow_filters: bool = Field(
        False, description="Whether a run may choose among the rows by what is in them (data.filter)."
    )
    allow_label_maps: bool = Field(
        True, description="Whether a run may say which labels there are (data.labels); classifiers must."
    )
    min_rows: Annotated[int, Field(ge=1), unit("rows")] = Field(
        1, description="A run that would train on fewer is not taken part in, unless it hides rows."
    )
    metrics: tuple[str, ...] | None = Field(
        None,
        description=("Names of the numbers that may accompany an update; others do not leave. Default: any."),
    )
    min_count: Annotated[int, Field(ge=1), unit("rows")] = Field(
        1,
        description=(
            "Numbers of rows below it do not leave, nor what follows from them; a run that needs them as"
            " weights is refused."
        ),
    )
    plugins: tuple[str, ...] = Field(
        (),
        description="Installed packages whose plugins a run may use; no others are loaded.",
    )
    capabilities: tuple[Literal["cores", "memory-mib"], ...] = Field(
        (), description="What the server's list of agents shows of this device."
    )
    tell_limits: tuple[str, ...] = Field(
        (),
        description=("Keys of this table whose number a refusal tells the server, for submitters to heed."),
    )

    @field_validator("tell_limits")
    @classmethod
    def _are_keys(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [key for key in keys if key not in cls.model_fields]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is no key of [policy]; name keys of this table")
        return keys

    @model_validator(mode="after")
    def _is_consistent(self) -> Policy:
        if self.needs_confinement and self.allow_download:
            raise ValueError(
                "needs_confinement takes the worker's network, which allow_download needs; keep one"
            )
        return self

    @property
    def delta(self) -> float:
        """The delta of the device's own account."""
        return DELTA if self.max_delta is None else self.max_delta

    @property
    def list_privacy_demands(self) -> list[str]:
        """Keys that ask a run for a promise."""
        keys = (
            "privacy",
            "user",
            "min_noise_multiplier",
            "max_run_epsilon",
            "max_total_epsilon",
            "max_delta",
        )
        return [key for key in keys if getattr(self, key) is not None]

    @property
    def run_epsilon_cap(self) -> float:
        """What one run may come to; without a word on privacy anything."""
        if self.max_run_epsilon is not None:
            return self.max_run_epsilon
        return MOST_EPSILON if self.list_privacy_demands else math.inf


@dataclass(frozen=True)
class Objection:
    """One thing that speaks against a task.

    Attributes:
        key: of `[policy]`.
        text: for the owner alone.
        limit: the owner's number, if that is what the key holds.
    """

    key: str
    text: str
    limit: float | None = None


def refuse(against: Sequence[Objection | None]) -> None:
    """Refuse a task if anything speaks against it.

    Raises:
        PolicyError: with all texts and all keys.
    """
    found = [objection for objection in against if objection is not None]
    if found:
        text = "; ".join(objection.text for objection in found)
        raise PolicyError(text, {objection.key: objection.limit for objection in found})


def objections(policy: Policy, run: RunConfig) -> list[Objection]:
    """Why the owner does not want to take part in a run; empty if nothing speaks against it."""
    return [
        *_names(policy, run),
        *_stages(policy, run),
        *_privacy(policy, run),
        *_work(policy, run),
        *_data(policy, run.data),
    ]


def find_unwanted_metrics(policy: Policy, metrics: Collection[str]) -> list[Objection]:
    """Why an update must not leave with these metrics, by name; the worker has withheld them already."""
    if policy.metrics is None:
        return []
    return [
        Objection("metrics", f"metric {name!r} is not in policy.metrics ({', '.join(policy.metrics)})")
        for name in sorted(metrics)
        if name not in policy.metrics
    ]


def model_objections(policy: Policy, name: str) -> list[Objection]:
    """Why the owner does not want a base model loaded by its name; empty if nothing speaks against it.

    Args:
        name: on the hub, or "embedded"; empty: the run's model is a folder of its server.
    """
    if not name:
        text = "the run's base model is a folder of its server; say where this device's copy lies: --model"
        return [Objection("models", f"{text} DIR, or model in client.toml")]
    if name == EMBEDDED or policy.models is None or name in policy.models:
        return []
    allowed = ", ".join(policy.models) or "which is empty"
    return [Objection("models", f"model {name!r} is not in policy.models ({allowed})")]


def over_bytes(policy: Policy, used: int, more: int) -> Objection | None:
    """Why `more` bytes would be too many today."""
    if policy.max_bytes_per_day is None or used + more <= policy.max_bytes_per_day:
        return None
    return Objection(
        "max_bytes_per_day",
        f"{more} bytes more than today's {used} exceed policy.max_bytes_per_day = {policy.max_bytes_per_day}",
        policy.max_bytes_per_day,
    )


def _names(policy: Policy, run: RunConfig) -> list[Objection]:
    stated = {
        "runs": run.run.name,
        "tasks": run.model.task,
        "methods": run.peft.method,
        "training": run.training.kind,
        "spaces": run.space.kind,
    }
    return [
        Objection(key, f"{value!r} is not in policy.{key} ({', '.join(allowed) or 'which is empty'})")
        for key, value in stated.items()
        if (allowed := getattr(policy, key)) is not None and value not in allowed
    ]


def _stages(policy: Policy, run: RunConfig) -> list[Objection]:
    kinds = [stage.kind for stage in run.stages]
    unwanted = [kind for kind in kinds if policy.stages is not None and kind not in policy.stages]
    missing = [kind for kind in policy.needs_stages if kind not in kinds]
    return [Objection("stages", f"stage {kind!r} is not in policy.stages") for kind in unwanted] + [
        Objection("needs_stages", f"stage {kind!r}, which policy.needs_stages asks for, is missing")
        for kind in missing
    ]


def _privacy(policy: Policy, run: RunConfig) -> list[Objection]:
    wanted = policy.list_privacy_demands
    promise = run.privacy
    if not wanted:
        return []
    if promise is None:
        return [Objection(wanted[0], f"the run promises no privacy, which policy.{wanted[0]} asks for")]
    problems = []
    if promise.seeded:
        problems.append(
            Objection(
                wanted[0],
                f"the run's noise is drawn from its seed, which protects nobody; policy.{wanted[0]} asks for"
                " privacy",
            )
        )
    if policy.privacy is not None and promise.kind not in policy.privacy:
        text = f"{promise.kind!r} is not in policy.privacy ({', '.join(policy.privacy)})"
        problems.append(Objection("privacy", text))
    if policy.user is not None and promise.kind == "record-level" and run.data.user not in policy.user:
        unit = "single rows" if run.data.user is None else f"each {run.data.user!r}"
        text = f"the run protects {unit}; policy.user asks for {' or '.join(policy.user)} (data.user)"
        problems.append(Objection("user", text))
    if policy.min_noise_multiplier is not None and promise.noise_multiplier < policy.min_noise_multiplier:
        least = policy.min_noise_multiplier
        text = (
            f"noise_multiplier {promise.noise_multiplier:g} is below policy.min_noise_multiplier = {least:g}"
        )
        problems.append(Objection("min_noise_multiplier", text, least))
    if policy.max_run_epsilon is not None and promise.max_epsilon > policy.max_run_epsilon:
        most = policy.max_run_epsilon
        text = f"max_epsilon {promise.max_epsilon:g} is above policy.max_run_epsilon = {most:g}"
        problems.append(Objection("max_run_epsilon", text, most))
    if policy.max_delta is not None and promise.target_delta > policy.max_delta:
        text = f"target_delta {promise.target_delta:g} is above policy.max_delta = {policy.max_delta:g}"
        problems.append(Objection("max_delta", text, policy.max_delta))
    return problems


def _data(policy: Policy, data: DataSection) -> list[Objection]:
    """What a run asks of the rows."""
    found = []
    if data.filter and not policy.allow_filters:
        text = "the run chooses among the rows (data.filter), which policy.allow_filters = true would permit"
        found.append(Objection("allow_filters", text))
    if data.labels is not None and not policy.allow_label_maps:
        text = "the run says which labels there are (data.labels); policy.allow_label_maps is false"
        found.append(Objection("allow_label_maps", text))
    if policy.fields is not None:
        found += [
            Objection("fields", f"field {name!r} is not in policy.fields ({', '.join(policy.fields)})")
            for name in fields_used(data)
            if name not in policy.fields
        ]
    return found


def fields_used(data: DataSection) -> list[str]:
    """The fields of a row that a run reads, sorted; of a template that is none, its whole text."""
    used = {name for name in (data.label, data.user, data.explode) if name is not None} | set(
        data.filter or ()
    )
    for key in ("prompt", "answer", "text"):
        template = getattr(data, key)
        if template is None:
            continue
        try:
            used |= compile_template(template, key).fields
        except DataError:
            used.add(template)
    return sorted(used)


def _work(policy: Policy, run: RunConfig) -> list[Objection]:
    steps = run.training.steps
    if policy.max_local_steps is None or (steps is not None and steps <= policy.max_local_steps):
        return []
    stated = "as many local steps as it likes (training.epochs)" if steps is None else f"{steps} local steps"
    text = f"the run asks for {stated}; policy.max_local_steps is {policy.max_local_steps}"
    return [Objection("max_local_steps", text, policy.max_local_steps)]
