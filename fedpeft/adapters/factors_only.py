"""Merging adapters whose start is unknown: rules are for changes, and a whole embedding is none."""

from dataclasses import dataclass, replace

from fedpeft.adapters.linear import Average
from fedpeft.adapters.stack import AdapterStack, Float32Array, Merger


@dataclass(frozen=True)
class FactorsOnly:
    """A rule for LoRA's own tensors, and the weighted mean for embeddings and heads that lie beside them.

    Task arithmetic would make 0.6 of an embedding that two adapters have in common; its mean is itself.
    """

    rule: Merger

    def __str__(self) -> str:
        return str(self.rule)

    def merge(self, stack: AdapterStack) -> dict[str, Float32Array]:
        """As the rule does, but for tensors that are whole."""
        whole = whole_tensors(stack)
        factors = [name for name in stack.names if name not in whole]
        merged = self.rule.merge(_part(stack, factors)) if factors else {}
        return merged | (Average().merge(_part(stack, whole)) if whole else {})


def whole_tensors(stack: AdapterStack) -> tuple[str, ...]:
    """Names of the tensors of LoRA adapters that are no part of a low-rank update."""
    return tuple(
        name for name in stack.names if not any(part.startswith("lora_") for part in name.split("."))
    )


def _part(stack: AdapterStack, names: list[str] | tuple[str, ...]) -> AdapterStack:
    parts = tuple({name: adapter[name] for name in names} for adapter in stack.adapters)
    return replace(stack, adapters=parts)
