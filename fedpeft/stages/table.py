"""The stages by name."""

from __future__ import annotations

from typing import Any

from fedpeft.config import RunConfig
from fedpeft.errors import RunFileError
from fedpeft.options import build_option
from fedpeft.stages.base import Stage
from fedpeft.stages.clip import Clip
from fedpeft.stages.compeft import Compeft
from fedpeft.stages.composition import composition_problems
from fedpeft.stages.dare import Dare
from fedpeft.stages.identity import Identity
from fedpeft.stages.quantise import Quantise
from fedpeft.stages.random_k import RandomK
from fedpeft.stages.sign import Sign
from fedpeft.stages.top_k import TopK
from fedpeft.stages.weigh import Weigh

STAGES: dict[str, Any] = {  # a class that is a Stage and takes its options by name
    "clip": Clip,
    "compeft": Compeft,
    "dare": Dare,
    "identity": Identity,
    "quantise": Quantise,
    "random-k": RandomK,
    "sign": Sign,
    "top-k": TopK,
    "weigh": Weigh,
}


def build_stages(run: RunConfig) -> tuple[Stage, ...]:
    """The run's stages in the client's order; the run's weighting is always the first.

    Raises:
        RunFileError: unknown stages or options, or stages that can't follow each other; all at once.
    """
    asked: list[Stage] = []
    problems: list[str] = []
    for index, section in enumerate(run.stages):
        try:
            asked.append(build_option(f"stages.{index}", STAGES, section.kind, section.options))
        except RunFileError as error:
            problems.extend(error.problems)
    known = [(section.kind, STAGES[section.kind].role) for section in run.stages if section.kind in STAGES]
    if len(known) == len(run.stages):  # else the places would be wrong
        problems.extend(composition_problems(known, run.space.kind))
    if problems:
        raise RunFileError("run file", problems)
    return (Weigh(by=run.federation.weighting), *asked)
