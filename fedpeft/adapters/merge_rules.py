"""The merging rules by name, and the search of a coefficient on held-out data."""

import math
from collections.abc import Callable, Sequence

from fedpeft.adapters.breadcrumbs import Breadcrumbs
from fedpeft.adapters.dare import DareMerge
from fedpeft.adapters.linear import Average, TaskArithmetic
from fedpeft.adapters.lines import Lines
from fedpeft.adapters.pcb import Pcb
from fedpeft.adapters.stack import AdapterStack, Deltas, Float32Array, Merger
from fedpeft.adapters.ties import Ties
from fedpeft.errors import UpdateError

METHODS: dict[str, Callable[..., Merger]] = {
    "average": Average,
    "task-arithmetic": TaskArithmetic,
    "ties": Ties,
    "dare": DareMerge,
    "lines": Lines,
    "pcb": Pcb,
    "breadcrumbs": Breadcrumbs,
}


def merger_named(name: str, **coefficients: float) -> Merger:
    """The rule of that name with its coefficients (`lam`, `density`, ...; `seed` for dare).

    Raises:
        UpdateError: unknown name, a coefficient that the rule does not have, one missing, or one out of
            range.
    """
    if name not in METHODS:
        raise UpdateError(f"merging method {name!r}: choose one of {', '.join(METHODS)}")
    try:
        return METHODS[name](**coefficients)
    except TypeError as problem:
        raise UpdateError(f"merging method {name!r}: {problem}") from problem


def best_on_held_out(
    stack: AdapterStack, candidates: Sequence[Merger], score: Callable[[Deltas], float]
) -> tuple[Merger, dict[str, Float32Array]]:
    """The candidate whose merged delta scores highest on held-out data, and that delta; the first of equals.

    Raises:
        UpdateError: no candidates, or no candidate with a score that is a number.
    """
    best: tuple[float, Merger, dict[str, Float32Array]] | None = None
    for candidate in candidates:
        merged = candidate.merge(stack)
        value = score(merged)
        if not math.isnan(value) and (best is None or value > best[0]):
            best = (value, candidate, merged)
    if best is None:
        raise UpdateError(
            f"none of {len(candidates)} merging candidates has a score: check the held-out data"
        )
    return best[1], best[2]
