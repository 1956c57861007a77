"""Metrics and intervals against sums written out here."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.errors import RunFileError
from fedpeft.evaluation.evaluate import join, summarise
from fedpeft.evaluation.metrics import METRICS, interval, metrics_of, value

Columns = dict[str, np.ndarray]


def columns(seed: int, count: int) -> Columns:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 9, count).astype(float)
    correct = np.minimum(tokens, rng.integers(0, 9, count).astype(float))
    return {
        "index": np.arange(count, dtype=float),
        "nll": rng.exponential(size=count) * tokens,
        "tokens": tokens,
        "correct": correct,
        "exact": (correct == tokens).astype(float),
        "rouge_l": rng.random(count),
    }


@given(st.integers(0, 10_000), st.integers(1, 40))
def test_ratios(seed: int, count: int) -> None:
    given_ = columns(seed, count)
    loss = sum(given_["nll"].tolist()) / sum(given_["tokens"].tolist())
    assert value("loss", given_) == pytest.approx(loss)
    assert value("perplexity", given_) == pytest.approx(math.exp(loss))
    assert value("token-accuracy", given_) == pytest.approx(given_["correct"].sum() / given_["tokens"].sum())
    assert value("exact-match", given_) == pytest.approx(given_["exact"].mean())
    assert value("rouge-l", given_) == pytest.approx(given_["rouge_l"].mean())


@given(st.integers(0, 10_000), st.integers(2, 40))
def test_the_order_of_shards_does_not_change_a_bit(seed: int, count: int) -> None:
    whole = columns(seed, count)
    order = np.random.default_rng(seed).permutation(count)
    cut = count // 2
    shards = [{name: column[part] for name, column in whole.items()} for part in (order[:cut], order[cut:])]
    joined = join(shards)
    for name, column in whole.items():
        np.testing.assert_array_equal(joined[name], column)
    assert all(value(name, joined) == value(name, whole) for name in METRICS)


def test_no_example_has_no_value() -> None:
    assert math.isnan(value("loss", columns(0, 0)))


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """300 samples of 60 examples: coverage of a 95% interval; fewer than 266 hits has a chance below 1e-5."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(300):
        nll = rng.exponential(size=60)
        sample = {"nll": nll, "tokens": np.ones(60)}
        low, high = interval("loss", sample, resamples=400, rng=rng)
        assert low <= value("loss", sample) <= high
        hits += low <= 1.0 <= high
    assert 266 <= hits < 300


def test_one_example_has_a_degenerate_interval() -> None:
    single = columns(3, 1)
    assert (
        interval("loss", single, resamples=10, rng=np.random.default_rng(0)) == (value("loss", single),) * 2
    )


def test_summary_per_client() -> None:
    given_ = columns(1, 10)
    clients = {"a": np.arange(4), "b": np.arange(4, 10), "none": np.zeros(0, dtype=np.int64)}
    result = summarise(
        given_, ("exact-match", "loss"), clients=clients, resamples=50, rng=np.random.default_rng(0)
    )
    assert result.scores["exact-match"].count == 10
    assert set(result.clients["loss"]) == {"a", "b"}
    expected = given_["nll"][:4].sum() / given_["tokens"][:4].sum()
    assert result.clients["loss"]["a"] == pytest.approx(expected)


def test_names_and_tasks_are_checked_at_once() -> None:
    assert metrics_of("causal-lm", (), answers=True) == ("exact-match", "loss")
    assert metrics_of("causal-lm", (), answers=False) == ("perplexity", "loss")
    assert metrics_of("sequence-classification", (), answers=False) == ("accuracy", "loss")
    with pytest.raises(RunFileError) as caught:
        metrics_of("causal-lm", ("accuracy", "rouge", "exact-match"), answers=False)
    assert len(caught.value.problems) == 3
