"""The spaces by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedpeft.aggregation.lora_rules import rule_of
from fedpeft.config.option_tables import build_option
from fedpeft.config.sections import RunConfig, SpaceSection
from fedpeft.config.traits import NO_TRAITS, Traits
from fedpeft.spaces.adapter_delta import AdapterDelta
from fedpeft.spaces.base import Space, SpaceOptions
from fedpeft.spaces.projected_options import ProjectedOptions
from fedpeft.spaces.seed_options import SeedScalarsOptions

if TYPE_CHECKING:
    from torch import nn

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


def space_traits(kind: str) -> Traits:
    """What a space is whatever its options; empty for one that there is not."""
    traits: Traits = SPACES[kind].declares if kind in SPACES else NO_TRAITS
    return traits


def build_space(run: RunConfig, model: nn.Module) -> Space:
    """The space of a run over a model that was just loaded.

    Raises:
        RunFileError: an unknown name or option.
        FedPEFTError: the model's trainable set cannot be expressed in it.
    """
    space = space_options(run.space).open(run, model)
    rule = rule_of(run)
    if rule is not None and rule.residual and space.kind == AdapterDelta.kind:
        from fedpeft.spaces.residual import ResidualSpace  # with a model, as it brings torch

        return ResidualSpace(model)
    return space
