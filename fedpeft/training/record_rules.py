"""What a training may not ask for under record-level privacy, with the reason.

Every PEFT method and every kind of base may train: rows go through the model one at a time, so a row's
gradient is its own by construction, and `fedpeft.training.row_isolation` looks at the run's own model.
"""

from __future__ import annotations

from fedpeft.config.sections import RecordLevelPrivacy, RunConfig, TrainingSection
from fedpeft.training.lean import SAVERS

_ROW_BY_ROW = frozenset({"gradient_checkpointing"})
"""Savers that work on one row as on many."""


def record_problems(run: RunConfig) -> list[str]:
    """Why this training cannot be private at record level, one line each; none if it can."""
    if not isinstance(run.privacy, RecordLevelPrivacy):
        return []
    if run.training.kind == "zeroth-order":
        return _zeroth_problems(run.training)
    return section_problems(run.training) if run.training.kind == "first-order" else []


def _zeroth_problems(section: TrainingSection) -> list[str]:
    """Keys of a zeroth-order step that one Poisson batch has no use for."""
    if section.gradient_accumulation == 1:
        return []
    return [
        "training.gradient_accumulation cannot be used under record-level privacy: a private step is one"
        " Poisson batch; set 1 and choose the sample rate"
    ]


def section_problems(section: TrainingSection) -> list[str]:
    """Options of first-order training that DP-SGD cannot honour, one line each."""
    refused = (
        *(
            (saver.asked(section), key, "each row's own gradient is needed, of all parameters; remove it")
            for key, saver in SAVERS.items()
            if key not in _ROW_BY_ROW
        ),
        (
            section.max_grad_norm is not None,
            "max_grad_norm",
            "it bounds a whole batch's gradient; give the bound per example under privacy and remove it here",
        ),
        (
            section.gradient_accumulation != 1,
            "gradient_accumulation",
            "a private step is one Poisson batch; set 1 and choose the sample rate",
        ),
    )
    return [
        f"training.{key} cannot be used under record-level privacy: {why}"
        for wrong, key, why in refused
        if wrong
    ]
