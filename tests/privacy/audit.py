"""What a membership attack proves about epsilon: a lower bound that holds with stated confidence."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta  # type: ignore[import-untyped]  # scipy ships no types

CONFIDENCE = 0.999


def epsilon_lower_bound(
    without: NDArray[np.float64], with_: NDArray[np.float64], delta: float, confidence: float = CONFIDENCE
) -> float:
    """The largest epsilon that the scores disprove, at `confidence`; 0 when they disprove nothing.

    An attack that says "member" above a threshold has rates with TPR <= e^eps FPR + delta, and likewise for
    its complement. The threshold is chosen on the first half of the scores, the rates are bounded on the
    second by Clopper and Pearson's intervals, four of them.
    """
    half = min(len(without), len(with_)) // 2
    threshold = _best_threshold(without[:half], with_[:half], delta)
    level = (1.0 - confidence) / 4.0
    out, in_ = without[half:], with_[half:]
    true, false = int((in_ > threshold).sum()), int((out > threshold).sum())
    bounds = (
        (_low(true, len(in_), level), _high(false, len(out), level)),
        (_low(len(out) - false, len(out), level), _high(len(in_) - true, len(in_), level)),
    )
    return max(0.0, *(math.log((low - delta) / high) for low, high in bounds if low > delta))


def _best_threshold(without: NDArray[np.float64], with_: NDArray[np.float64], delta: float) -> float:
    def looks(threshold: float) -> float:
        true, false = (float((scores > threshold).mean()) for scores in (with_, without))
        smallest = 1.0 / len(without)
        return max((true - delta) / max(false, smallest), (1 - false - delta) / max(1 - true, smallest))

    candidates = np.quantile(np.concatenate([without, with_]), np.linspace(0.02, 0.98, 97))
    return float(max(candidates, key=looks))


def _low(count: int, trials: int, level: float) -> float:
    return float(beta.ppf(level, count, trials - count + 1)) if count else 0.0


def _high(count: int, trials: int, level: float) -> float:
    return float(beta.ppf(1 - level, count + 1, trials - count)) if count < trials else 1.0
