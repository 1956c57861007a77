"""Numbers and names as people read them."""

from __future__ import annotations

import math

import pytest

from fedpeft.reporting import text


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [
        ("exact-match", 0.8175, "81.8%"),
        ("accuracy", 1.0, "100.0%"),
        ("rouge_l", 0.005, "0.5%"),
        ("loss", 0.76543, "0.765"),
        ("perplexity", 12.345, "12.35"),
        ("perplexity", 123.45, "123.5"),
        ("perplexity", 1234.5, "1234"),
        ("perplexity", 1234567.0, "1,234,567"),
        ("perplexity", math.inf, "∞"),
        ("loss", math.nan, "–"),
        ("loss", None, "–"),
        ("loss", -2.0, "-2.000"),
    ],
)
def test_metric_values_have_the_unit_of_their_metric(metric: str, value: float | None, shown: str) -> None:
    assert text.metric_value(metric, value) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (63_898, "62.4 KiB"),
        (262_144, "256 KiB"),
        (3 * 2**20, "3.00 MiB"),
        (5.5 * 2**30, "5.50 GiB"),
        (2**50, "1024 TiB"),
    ],
)
def test_bytes_are_shown_in_binary_units(count: float, shown: str) -> None:
    assert text.byte_size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (112.4, "1 min 52 s"),
        (3599.6, "1 h 00 min"),
        (7380, "2 h 03 min"),
    ],
)
def test_durations_never_show_sixty(seconds: float, shown: str) -> None:
    assert text.duration(seconds) == shown


def test_control_characters_never_reach_a_terminal() -> None:
    assert text.printable("a\x1b[31mb\x00c\nd\u202e") == "a\ufffd[31mb\ufffdc\ufffdd\ufffd"
    assert text.printable("日本語") == "日本語"
    assert text.printable("abcdefgh", 5) == "abcd…"
    assert text.printable("abcde", 5) == "abcde"


def test_names_and_directions() -> None:
    assert [text.metric_name(name) for name in ("exact-match", "rouge-l", "loss")] == [
        "exact match",
        "ROUGE-L",
        "loss",
    ]
    assert text.direction(True) == "↑"
    assert text.direction(False) == "↓"
    assert text.count_noun(1, "client") == "1 client"
    assert text.count_noun(1200, "client") == "1,200 clients"
    assert text.metric_difference("accuracy", -0.123) == "12.3 points"
    assert text.metric_difference("loss", -0.31) == "0.310"
