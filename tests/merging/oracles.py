"""The merging rules again, as loops over Python floats on one flat tensor per task."""

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]


def ranked(row: Sequence[float]) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


def weighted_sum(rows: Rows, weights: Sequence[float]) -> list[float]:
    return [
        sum(weight * row[i] for weight, row in zip(weights, rows, strict=True)) for i in range(len(rows[0]))
    ]


def masked(row: Sequence[float], kept: Sequence[int]) -> list[float]:
    return [value if i in kept else 0.0 for i, value in enumerate(row)]


def ties(tensors: dict[str, Rows], weights: Sequence[float], kept: dict[str, int]) -> dict[str, list[float]]:
    trimmed = {
        name: [masked(row, ranked(row)[: kept[name]]) for row in rows] for name, rows in tensors.items()
    }
    votes = sum(sign(total) for rows in trimmed.values() for total in weighted_sum(rows, weights))
    majority = 1 if votes >= 0 else -1
    merged = {}
    for name, rows in trimmed.items():
        merged[name] = [0.0] * len(rows[0])
        for i, total in enumerate(weighted_sum(rows, weights)):
            elected = sign(total) or majority
            agreeing = [(w, row[i]) for w, row in zip(weights, rows, strict=True) if sign(row[i]) == elected]
            mass = sum(w for w, _ in agreeing)
            merged[name][i] = sum(w * value for w, value in agreeing) / mass if mass > 0 else 0.0
    return merged


def breadcrumbs(rows: Rows, weights: Sequence[float], top: int, kept: int) -> list[float]:
    return weighted_sum([masked(row, ranked(row)[top : top + kept]) for row in rows], weights)


def unit_range(row: Sequence[float]) -> list[float]:
    low, high = min(row), max(row)
    return [(value - low) / (high - low) if high > low else 0.0 for value in row]


def pcb(rows: Rows, weights: Sequence[float], kept: int) -> list[float]:
    size, tasks = len(rows[0]), len(rows)
    cut = int(1e-4 * size)
    strengths, clipped = [], []
    for row, weight in zip(rows, weights, strict=True):
        ordered = sorted(abs(value) for value in row)
        magnitudes = [min(max(abs(value), ordered[cut]), ordered[size - 1 - cut]) for value in row]
        intra = [math.exp(tasks * value**2) for value in unit_range(magnitudes)]
        scores = [intra[i] * math.tanh(row[i] * sum(other[i] for other in rows)) for i in range(size)]
        if kept < size:
            floor = sorted(scores)[size - kept - 1]
            scores = [max(score, floor) for score in scores]
        strengths.append([weight * value for value in unit_range(scores)])
        clipped.append([sign(value) * magnitude for value, magnitude in zip(row, magnitudes, strict=True)])
    merged = []
    for i in range(size):
        mass = sum(strength[i] for strength in strengths)
        total = sum(strength[i] * values[i] for strength, values in zip(strengths, clipped, strict=True))
        merged.append(total / mass if mass > 0 else 0.0)
    return merged
