"""What an adapter on every linear layer leaves alone, although people take it for covered: experts."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd

from fedpeft.config.sections import PeftSection
from fedpeft.models.methods import METHODS
from fedpeft.models.patterns import find_wrapped_parameters

__all__ = ["coverage_notes"]


def coverage_notes(model: nn.Module, section: PeftSection) -> tuple[str, ...]:
    """Say which tensors stay frozen that no linear layer holds, where all linear layers were asked for.

    transformers keeps the experts of a layer as one parameter [experts, out, in], which is no module.

    Args:
        model: from `attach`.
        section: with which it was attached.
    """
    method = METHODS[section.method]
    if method.targets != "linear" or section.options.get("target_modules") not in (None, "all-linear"):
        return ()
    left = dict(_stacks(model))
    if not left:
        return ()
    names = sorted({".".join(name.split(".")[-2:]) for name in left})
    experts = method.config == "LoraConfig" and all(name.startswith("experts.") for name in names)
    count, total = sum(left.values()), sum(parameter.numel() for parameter in model.parameters())
    advice = (
        f"to train them, set peft.target_parameters = {names}".replace("'", '"')
        if experts
        else "peft.method 'full' trains them"
    )
    share = f"{count:,} of {total:,} weights ({count / total:.0%})"
    return (
        f"{section.method} leaves {share} frozen that no linear layer holds ({', '.join(names)}); {advice}",
    )


def _stacks(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Frozen parameters of three or more dimensions, convolutions' apart, with their sizes."""
    adapted = set(find_wrapped_parameters(model))
    for prefix, module in model.named_modules():
        if isinstance(module, _ConvNd):
            continue
        own = prefix.replace(".base_layer", "")
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 2 and not parameter.requires_grad and f"{own}.{name}" not in adapted:
                yield f"{own}.{name}", parameter.numel()
