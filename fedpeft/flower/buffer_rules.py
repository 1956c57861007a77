"""What mode 'buffered' cannot be combined with, and why."""

from __future__ import annotations

from fedpeft.config import ClientLevelPrivacy, RunConfig
from fedpeft.errors import RunFileError
from fedpeft.flower.in_flight import buffer_of, concurrency_problems
from fedpeft.flower.rules import RULES
from fedpeft.stages import build_stages
from fedpeft.staleness import weight_problems

_MODE = "federation.mode 'buffered'"


def buffer_problems(run: RunConfig, clients: int | None) -> list[str]:
    """One line per problem; none for synchronous runs.

    Args:
        clients: of the run; None where they are not known yet.
    """
    if run.federation.mode != "buffered":
        return []
    section = buffer_of(run)
    return [
        *weight_problems(section),
        *(concurrency_problems(section, clients) if clients is not None else ()),
        *_asking_problems(run),
        *_update_problems(run),
        *_ledger_problems(run, section.max_staleness),
    ]


def _asking_problems(run: RunConfig) -> list[str]:
    """Keys that say who is asked in a synchronous round."""
    federation, problems = run.federation, []
    if federation.sampling.kind != "all":
        problems.append(
            f"federation.sampling: {_MODE} draws no cohorts; federation.buffer.concurrency says how many work"
            " at a time, so remove it"
        )
    if federation.over_selection:
        problems.append(
            f"federation.over_selection: {_MODE} waits for nobody, so there is nobody to ask in reserve;"
            " remove it"
        )
    if isinstance(run.privacy, ClientLevelPrivacy):
        problems.append(
            f"privacy: client-level noise is made for secret cohorts drawn by coins, and in {_MODE} who is in"
            " a buffer follows from how quick everyone is, which others may know; use mode 'synchronous', or"
            " kind 'local' or 'record-level'"
        )
    return problems


def _update_problems(run: RunConfig) -> list[str]:
    """What needs all updates of a round to start from one state."""
    problems = []
    rule = RULES.get(run.federation.strategy.kind)
    if rule is not None and not rule.folds:
        problems.append(
            f"federation.strategy: {run.federation.strategy.kind} compares updates of one round, and in"
            f" {_MODE} they start from different states, so that honest ones are far apart; use fedavg or"
            " another rule of the mean"
        )
    if run.space.kind == "projected":
        problems.append(
            f"space: coefficients of 'projected' belong to the directions of one round, and {_MODE} sums"
            " updates of several; use 'seed-scalars' (any mode) or 'adapter-delta'"
        )
    if run.federation.lora_rule is not None:
        problems.append(
            f"federation.lora_rule: '{run.federation.lora_rule}' combines LoRA's factors with those of the"
            f" state that all updates of a round started from, and in {_MODE} they started from several;"
            " remove it"
        )
    problems += [
        f"groups.{place}: clients that hold another base, another rank or a part of the adapter are sent the"
        f" state of the round alone, and {_MODE} sends older ones after a restart; remove {key}"
        for place, group in enumerate(run.groups)
        for key in ("model", "peft", "trains")
        if getattr(group, key)
    ]
    try:
        stages = build_stages(run)
    except RunFileError:  # whoever checks the stages says what is wrong with them
        return problems
    for stage in stages:
        if stage.role == "mask":
            problems.append(
                f"stages ({stage.kind}): masks cancel over a cohort that starts together, which {_MODE} has"
                f" not; remove the stage, or use mode 'synchronous'"
            )
        if getattr(stage, "error_feedback", False):
            problems.append(
                f"stages ({stage.kind}): error feedback counts on every update being used, and {_MODE} gives"
                " old ones up and weighs others down; set error_feedback = false"
            )
    return problems


def _ledger_problems(run: RunConfig, max_staleness: int) -> list[str]:
    kept = run.output.keep_checkpoints
    if kept is None or kept > max_staleness:
        return []
    return [
        f"output.keep_checkpoints: {kept} came, and work on the last {max_staleness + 1} states may be under"
        f" way when a run is resumed; keep at least {max_staleness + 1}, or lower"
        " federation.buffer.max_staleness"
    ]
