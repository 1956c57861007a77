"""First-order training in less memory: what can be asked for, what each saves, and where it cannot run.

No torch is imported: `fedpeft methods` lists the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fedpeft.config.sections import RunConfig, TrainingSection

GALORE = "galore"
PAGED = ("paged-adamw", "paged-adamw8bit")


@dataclass(frozen=True)
class MemoryOption:
    """One way to train in less memory.

    Attributes:
        summary: one line for people.
        saves: what takes less room, in a word or two.
        asked: whether a section asks for it.
        hindrance: why a run that asks for it cannot train so; None: it can.
        cuda: works on a CUDA device only.
    """

    summary: str
    saves: str
    asked: Callable[[TrainingSection], bool]
    hindrance: Callable[[RunConfig], str | None] = lambda run: None
    cuda: bool = False


def _describe_fused(run: RunConfig) -> str | None:
    training = run.training
    if training.gradient_accumulation > 1:
        return "a step's gradient is known after its last micro-batch only; set gradient_accumulation 1"
    if training.max_grad_norm is not None:
        return "the norm over all parameters is known after the last one has moved; remove max_grad_norm"
    return None


SAVERS: Mapping[str, MemoryOption] = MappingProxyType(
    {
        "gradient_checkpointing": MemoryOption(
            "activations within a layer are computed again for the backward pass (Chen et al. 2016)",
            "activations",
            lambda section: section.gradient_checkpointing,
        ),
        "activation_offload": MemoryOption(
            "activations wait for the backward pass in main memory",
            "GPU memory of activations",
            lambda section: section.activation_offload,
            cuda=True,
        ),
        "fused_update": MemoryOption(
            "each parameter moves once its gradient is there, which is then dropped (Lv et al. 2023, LOMO)",
            "gradients",
            lambda section: section.fused_update,
            _describe_fused,
        ),
        "sampled_layers": MemoryOption(
            "a few layers train at a time, the same for all clients of a round (Pan et al. 2024, LISA)",
            "gradients, optimiser",
            lambda section: section.sampled_layers is not None,
        ),
    }
)
"""By key of `[training]`. Lean optimisers stand among the others, in `fedpeft.training.optimizers`."""

_OWNED: Mapping[str, tuple[str, Callable[[TrainingSection], bool]]] = {
    "sample_every": ("sampled_layers", lambda section: section.sampled_layers is not None),
    **{
        key: (f"optimizer '{GALORE}'", lambda section: section.optimizer == GALORE)
        for key in ("projection_rank", "projection_every", "projection_scale")
    },
}


def lean_problems(run: RunConfig) -> list[str]:
    """What keeps a run from training as leanly as it asks, one line each; the device is another matter."""
    training = run.training
    if training.kind != "first-order":  # what zeroth-order trainers take is theirs to say
        return []
    return [*_idle_keys(training), *_hindrances(run)]


def _idle_keys(training: TrainingSection) -> Iterator[str]:
    """Keys of something that isn't asked for: silently ignored they would mislead."""
    defaults = TrainingSection()
    for key, (owner, asked) in _OWNED.items():
        if getattr(training, key) != getattr(defaults, key) and not asked(training):
            yield f"training.{key}: belongs to {owner}, which is not set; remove it"


def _hindrances(run: RunConfig) -> Iterator[str]:
    for key, saver in SAVERS.items():
        reason = saver.hindrance(run) if saver.asked(run.training) else None
        if reason is not None:
            yield f"training.{key}: {reason}"


def device_problems(run: RunConfig, *, cuda: bool) -> list[str]:
    """What a run, or one of its groups, asks for that only a CUDA device can do.

    Args:
        cuda: whether it is to train on one.
    """
    if cuda:
        return []
    problems: dict[str, None] = {}
    for part in (run, *(run.of_group(group) for group in run.groups)):
        training = part.training
        if training.kind == "none":
            continue
        for key, saver in SAVERS.items():
            if saver.cuda and saver.asked(training):
                problems[
                    f"training.{key}: needs a CUDA device, and this machine has none: activations already are"
                    " in main memory; remove it, or set gradient_checkpointing"
                ] = None
        if training.optimizer in PAGED:
            problems[
                f"training.optimizer: {training.optimizer} pages a GPU's memory, and this machine has no CUDA"
                " device; use adamw8bit or adafactor"
            ] = None
    return list(problems)
