"""The zeroth-order family: what each rule makes of a measured scalar, and whether seed space replays it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedpeft.config.option_tables import unknown_name
from fedpeft.config.sections import RunConfig, TrainingSection
from fedpeft.config.traits import Trait, Traits, choose_traits
from fedpeft.training.lean import SAVERS


@dataclass(frozen=True)
class ZerothOrderRule:
    """One member of the family.

    Attributes:
        step: how the scalar becomes a move: its size ("scalar"), its sign ("sign"), its size unless one of
            the other two candidates has a lower loss ("best-of-three"), or through a dense optimiser.
        summary: one line for people.
        measure: how the scalar is found, a name in `MEASURES`.
        dense: the `torch.optim` optimiser that it needs, by our name for it; None: no dense state.
        above: layers above a boundary are trained by back-propagation.
        one_layer: a direction moves one layer of many.
        forwards: what a direction costs in forward passes; a pass with tangents has three products for one,
            and so has a pass with gradients.
    """

    step: Literal["scalar", "sign", "best-of-three", "dense"]
    summary: str
    measure: Literal["difference", "tangent"] = "difference"
    dense: str | None = None
    above: bool = False
    one_layer: bool = False
    forwards: int = 2

    @property
    def walks(self) -> bool:
        """Whether every step moves all that trains by lr times a slope times a direction."""
        return self.step == "scalar" and not self.above and not self.one_layer

    @property
    def replays(self) -> bool:
        """Whether a step is an integer times a direction, so that integers alone rebuild it."""
        return not self.hindrance

    @property
    def traits(self) -> Traits:
        """What it is, as `fedpeft.compatibility` asks."""
        tangent = self.measure != "difference"
        return choose_traits(
            {
                Trait.NO_REPLAY: not self.replays,
                Trait.FORWARD_DERIVATIVES: tangent,
                Trait.MORE_THAN_SCALARS: tangent or self.above or self.step == "best-of-three",
            }
        )

    @property
    def hindrance(self) -> str:
        """Why integers alone don't rebuild a step; empty where they do."""
        if self.dense is not None:
            return "keeps dense state, so its steps are no multiples of directions"
        return "moves its upper layers by gradients, which are dense" if self.above else ""


RULES: dict[str, ZerothOrderRule] = {
    "zo-sgd": ZerothOrderRule("scalar", "move by the directional derivative (Malladi et al. 2023, MeZO)"),
    "sign": ZerothOrderRule("sign", "move by its sign alone (Zhang et al. 2024, ZO-Sign-SGD)"),
    "conservative": ZerothOrderRule(
        "best-of-three",
        "move, stay or move back, whichever has the least loss (Zhang et al. 2024)",
        forwards=5,
    ),
    "forward-grad": ZerothOrderRule(
        "scalar",
        "move by the exact derivative, by forward-mode differentiation (Baydin et al. 2022)",
        measure="tangent",
        forwards=3,
    ),
    "block-wise": ZerothOrderRule(
        "scalar",
        "each direction moves one layer, chosen by its index (Zhang et al. 2024)",
        one_layer=True,
    ),
    "sparse": ZerothOrderRule(
        "scalar", "only the smallest weights of theta_0 move (Liu et al. 2024, Sparse MeZO); training.density"
    ),
    "hybrid": ZerothOrderRule(
        "scalar",
        "zeroth order up to training.layers_below, first order above (Zhang et al. 2024)",
        above=True,
        forwards=5,
    ),
    "momentum": ZerothOrderRule(
        "dense", "SGD with momentum on the estimated gradient (Zhang et al. 2024)", dense="sgd"
    ),
    "adam": ZerothOrderRule(
        "dense", "Adam on the estimated gradient (Zhang et al. 2024, ZO-Adam)", dense="adam"
    ),
}

_OWNERS = {"density": "sparse", "layers_below": "hybrid", "lr_above": "hybrid"}  # keys of one rule each
_ABOVE = ("optimizer", "momentum", "weight_decay", "max_grad_norm")  # what first-order layers may have

MOMENTUM = 0.9  # of the rule of that name, where training.momentum says nothing


def zeroth_problems(run: RunConfig) -> list[str]:
    """What makes no sense in the values of a zeroth-order trainer's keys, one line each."""
    if run.training.kind != "zeroth-order":
        return []
    return [*_training_problems(run.training), *_rule_problems(run.training), *_step_problems(run)]


def _training_problems(training: TrainingSection) -> list[str]:
    """Keys that a zeroth-order step has no use for: silently ignored they would mislead."""
    if training.rule not in RULES:
        return [unknown_name("training.rule", training.rule, RULES)]
    defaults = TrainingSection()
    unused = {
        "optimizer": "the step is training.rule's",
        "schedule": "a replay needs one learning rate for all steps",
        "warmup_steps": "a replay needs one learning rate for all steps",
        "weight_decay": "decay is no multiple of a direction",
        "max_grad_norm": "there is no gradient; training.max_scalar bounds a step",
        **dict.fromkeys(SAVERS, "there is no backward pass to save memory in"),
        "sample_every": "there is no backward pass to save memory in",
        "precision": "differences of losses drown in the rounding of low precision",
    }
    rule = RULES[training.rule]
    if rule.dense != "sgd":
        unused["momentum"] = "only rule 'momentum' keeps one"
    if rule.measure != "difference":
        unused["radius"] = "a derivative is taken at a point"
    if rule.above:  # an optimiser's own affairs
        unused = {key: unused[key] for key in unused if key not in _ABOVE}
    return [
        f"training.{key}: a zeroth-order trainer takes none ({reason}); remove it"
        for key, reason in unused.items()
        if getattr(training, key) != getattr(defaults, key)
    ]


def _rule_problems(training: TrainingSection) -> list[str]:
    """Keys that belong to one rule."""
    defaults, problems = TrainingSection(), []
    for key, owner in _OWNERS.items():
        if training.rule != owner and getattr(training, key) != getattr(defaults, key):
            problems.append(f"training.{key}: only rule '{owner}' takes it; remove it, or set training.rule")
    if training.rule == "hybrid" and training.layers_below is None:
        problems.append(
            "training.layers_below: rule 'hybrid' needs it; give the number of layers from the bottom that"
            " are trained by forward passes alone"
        )
    return problems


def _step_problems(run: RunConfig) -> list[str]:
    """Where every client visits the round's directions equally often, what the number of steps has to be."""
    if run.space.options.get("mode") != "common":
        return []
    seeds, training = int(run.space.options.get("num_seeds", 4096)), run.training
    if training.steps is not None and training.steps * training.queries % seeds == 0:
        return []
    came = "training.epochs" if training.steps is None else f"{training.steps} steps x {training.queries}"
    return [
        f"training.steps: with space.mode 'common' every client visits the round's {seeds} directions equally"
        f" often, and {came} doesn't; set steps x queries to {math.lcm(seeds, training.queries)}, say"
    ]
