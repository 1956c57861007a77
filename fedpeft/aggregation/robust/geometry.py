"""Where norms and distances of updates are measured, and where their means are taken.

LoRA's factors are not unique: (G A, B G^-1) is the same product as (A, B) for every invertible G. Norms and
distances of factors, and their medians, depend on G, which whoever sends them may choose. So `Products`
measures what the model is changed by, s (B_i A_i - B A) for each module and the entries of all other arrays,
and takes means of that. Nothing of it depends on anybody's G, and no m x n matrix is formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.aggregation.robust.canonical import canonical
from fedpeft.aggregation.robust.coefficients import Gram, Vector
from fedpeft.aggregation.robust.pairs import Pair
from fedpeft.updates.low_rank import LoraFactors, product_svd, stack
from fedpeft.updates.update import Arrays

Wide = dict[str, NDArray[np.float64]]


class Geometry(Protocol):
    """What a robust rule must be able to ask of a round's updates."""

    def gram(self, updates: Sequence[Arrays]) -> Gram:
        """Inner products, float64 [n, n]."""
        ...

    def combine(self, updates: Sequence[Arrays], coefficients: Vector) -> Wide:
        """The change that is the sum of the updates times their coefficients, as an update."""
        ...


@dataclass(frozen=True)
class Entries:
    """Updates as they are: long vectors."""

    def gram(self, updates: Sequence[Arrays]) -> Gram:
        """Sum over the arrays."""
        return _entries_gram(updates, sorted(updates[0]))

    def combine(self, updates: Sequence[Arrays], coefficients: Vector) -> Wide:
        """Sum, entry by entry."""
        return {name: _sum([update[name] for update in updates], coefficients) for name in sorted(updates[0])}


@dataclass(frozen=True)
class Products:
    """LoRA updates as the changes of weights that they make.

    Attributes:
        pairs: from `fedpeft.aggregation.robust.lora_pairs`; arrays that are in none count by their entries.
        state: the factors that the updates are changes of.
    """

    pairs: tuple[Pair, ...]
    state: Arrays

    def gram(self, updates: Sequence[Arrays]) -> Gram:
        """Of all products and all other entries.

        Source: <B_i A_i, B_j A_j> is the sum of the entries of (B_i^T B_j) * (A_i A_j^T). The change
        (B + b)(A + a) - B A is itself a product of rank 2 r, [b, B] times [A + a; a], so what all clients
        have in common is never subtracted.
        """
        total = _entries_gram(updates, self._others(updates[0]))
        for pair in self.pairs:
            a, b = self.state[pair.a].astype(np.float64), self.state[pair.b].astype(np.float64)
            moves = [
                (update[pair.a].astype(np.float64), update[pair.b].astype(np.float64)) for update in updates
            ]
            total += pair.scaling**2 * _product_gram(
                [np.concatenate([a + da, da]) for da, _ in moves],
                [np.concatenate([db, b], axis=1) for _, db in moves],
            )
        return total

    def combine(self, updates: Sequence[Arrays], coefficients: Vector) -> Wide:
        """The factors, of the run's rank, nearest to the state's product plus the sum of changes.

        Source: truncation as in FlexLoRA (Bai et al. 2024); see `fedpeft.updates.low_rank` and `canonical`.
        """
        others = self._others(updates[0])
        result = {name: _sum([update[name] for update in updates], coefficients) for name in others}
        counted = [place for place in range(len(updates)) if coefficients[place] != 0.0]
        for pair in self.pairs:
            moved = [self._factors(pair, updates[place]) for place in counted]
            shares = [float(coefficients[place]) for place in counted]
            start = self._factors(pair)
            whole = stack([start, *moved], [1.0 - sum(shares), *shares])
            result |= self._change(pair, canonical(product_svd(whole), start))
        return result

    def canonical(self, update: Arrays) -> Wide:
        """The same products in the one form that each has; for rules that look at single entries."""
        result = {name: update[name].astype(np.float64) for name in self._others(update)}
        for pair in self.pairs:
            result |= self._change(pair, self._canonical_of(pair, update), self._canonical_of(pair))
        return result

    def from_canonical(self, change: Mapping[str, NDArray[np.float64]]) -> Wide:
        """A change of the canonical form of the state as one of the state itself."""
        result = {name: change[name] for name in self._others(change)}
        for pair in self.pairs:
            form = self._canonical_of(pair)
            moved = LoraFactors(form.a + change[pair.a], form.b + change[pair.b], pair.scaling)
            result |= self._change(pair, moved)
        return result

    def _others(self, arrays: Mapping[str, object]) -> list[str]:
        paired = {name for pair in self.pairs for name in (pair.a, pair.b)}
        return sorted(set(arrays) - paired)

    def _factors(self, pair: Pair, update: Arrays | None = None) -> LoraFactors:
        """A client's factors, or the state's."""
        a, b = self.state[pair.a].astype(np.float64), self.state[pair.b].astype(np.float64)
        if update is None:
            return LoraFactors(a, b, pair.scaling)
        return LoraFactors(a + update[pair.a], b + update[pair.b], pair.scaling)

    def _canonical_of(self, pair: Pair, update: Arrays | None = None) -> LoraFactors:
        return canonical(product_svd(self._factors(pair, update)), self._factors(pair))

    def _change(self, pair: Pair, moved: LoraFactors, start: LoraFactors | None = None) -> Wide:
        origin = self._factors(pair) if start is None else start
        return {pair.a: moved.a - origin.a, pair.b: moved.b - origin.b}


def _entries_gram(updates: Sequence[Arrays], names: Sequence[str]) -> Gram:
    total: Gram = np.zeros((len(updates), len(updates)))
    for name in names:
        rows = np.stack([update[name].astype(np.float64).reshape(-1) for update in updates])
        total += rows @ rows.T
    return total


def _product_gram(a: Sequence[NDArray[np.float64]], b: Sequence[NDArray[np.float64]]) -> Gram:
    """Of products b_i a_i, with a_i [q, n] and b_i [m, q]."""
    count, q = len(a), len(a[0])
    all_a, all_b = np.concatenate(a), np.concatenate(b, axis=1)  # [count q, n], [m, count q]
    result: Gram = np.empty((count, count))
    for place in range(
        count
    ):  # row by row, so that memory grows with the number of clients and not its square
        products = (b[place].T @ all_b) * (a[place] @ all_a.T)  # [q, count q]
        result[place] = products.reshape(q, count, q).sum(axis=(0, 2))
    return (result + result.T) / 2.0


def _sum(arrays: Sequence[NDArray[np.floating]], coefficients: Vector) -> NDArray[np.float64]:
    total = np.zeros(arrays[0].shape)
    for array, coefficient in zip(arrays, coefficients, strict=True):
        if coefficient != 0.0:
            total += coefficient * array.astype(np.float64)
    return total
