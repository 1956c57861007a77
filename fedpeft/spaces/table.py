"""The spaces by name."""

from __future__ import annotations

from typing import Any

from torch import nn

from fedpeft.config import RunConfig, SpaceSection
from fedpeft.lora_rules import rule_of
from fedpeft.options import build_option
from fedpeft.spaces.adapter_delta import AdapterDelta
from fedpeft.spaces.base import Space, SpaceOptions
from fedpeft.spaces.projected import ProjectedOptions
from fedpeft.spaces.residual import ResidualSpace
from fedpeft.spaces.seed_scalars import SeedScalarsOptions

SPACES: dict[str, Any] = {  # a class that is SpaceOptions and takes its options by name
    "adapter-delta": AdapterDelta,
    "projected": ProjectedOptions,
    "seed-scalars": SeedScalarsOptions,
}


def space_options(section: SpaceSection) -> SpaceOptions:
    """What a run file says of its space.

    Raises:
        RunFileError: an unknown name or option.
    """
    options: SpaceOptions = build_option("space", SPACES, section.kind, section.options)
    return options


def build_space(run: RunConfig, model: nn.Module) -> Space:
    """The space of a run over a model that was just loaded.

    Raises:
        RunFileError: an unknown name or option.
        FedPEFTError: the model's trainable set cannot be expressed in it.
    """
    space = space_options(run.space).open(run, model)
    rule = rule_of(run)
    if rule is not None and rule.residual and space.kind == ResidualSpace.kind:
        return ResidualSpace(model)
    return space
