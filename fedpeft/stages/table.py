"""The stages by name."""

from __future__ import annotations

from typing import Any

from fedpeft.config import RunConfig
from fedpeft.options import build_option
from fedpeft.stages.base import Stage
from fedpeft.stages.clip import Clip
from fedpeft.stages.identity import Identity
from fedpeft.stages.weigh import Weigh

STAGES: dict[str, Any] = {  # a class that is a Stage and takes its options by name
    "clip": Clip,
    "identity": Identity,
    "weigh": Weigh,
}


def build_stages(run: RunConfig) -> tuple[Stage, ...]:
    """The run's stages in the client's order; the run's weighting is always the first.

    Raises:
        RunFileError: an unknown stage or option.
    """
    asked: tuple[Stage, ...] = tuple(
        build_option(f"stages.{index}", STAGES, section.kind, section.options)
        for index, section in enumerate(run.stages)
    )
    return (Weigh(by=run.federation.weighting), *asked)
