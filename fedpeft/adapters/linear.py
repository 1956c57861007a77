"""Rules that are linear in the deltas: the mean, and task arithmetic."""

from dataclasses import dataclass

from fedpeft.adapters.stack import AdapterStack, Float32Array, map_tensors


@dataclass(frozen=True)
class Average:
    """The weighted mean: sum_t w_t tau_t / sum_t w_t."""

    def merge(self, stack: AdapterStack) -> dict[str, Float32Array]:
        """Mean per entry, in float64."""
        shares = stack.weight_column / stack.weight_column.sum()
        return map_tensors(stack, lambda deltas: (shares * deltas).sum(axis=0))


@dataclass(frozen=True)
class TaskArithmetic:
    """lam x sum_t w_t tau_t.

    Source: Ilharco et al. (2023), "Editing Models with Task Arithmetic", section 2; weights are 1 there, and
    0.3 to 0.4 is where lam often ends up on held-out data.
    """

    lam: float = 0.3

    def merge(self, stack: AdapterStack) -> dict[str, Float32Array]:
        """Weighted sum per entry, in float64."""
        return map_tensors(stack, lambda deltas: self.lam * (stack.weight_column * deltas).sum(axis=0))
