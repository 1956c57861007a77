"""Numbers and names as a person reads them: units, directions, and names that cannot harm a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedpeft.runtime.safe_text import replace_unprintable

# Metrics whose value is a share of one; they are shown in percent. Anything else is shown as it is.
_SHARES = frozenset({"accuracy", "exact-match", "token-accuracy", "rouge-l", "rougel", "f1"})
_NAMES = {"rouge-l": "ROUGE-L", "rougel": "ROUGE-L", "f1": "F1"}
_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

MISSING = "–"


def metric_name(metric: str) -> str:
    """The metric in words: ``exact-match`` is "exact match"."""
    key = _key(metric)
    return _NAMES.get(key, printable(key.replace("-", " ")))


def is_share(metric: str) -> bool:
    """Whether the metric is a share of one, shown in percent."""
    return _key(metric) in _SHARES


def metric_value(metric: str, value: float | None) -> str:
    """A value of the metric: shares in percent with one decimal, others with three to four digits."""
    if value is None or math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if is_share(metric):
        return f"{100 * value:.1f}%"
    return plain_number(value)


def metric_difference(metric: str, difference: float) -> str:
    """The size of a difference between two values of the metric, without its sign: "12.3 points", "0.310"."""
    if is_share(metric) and math.isfinite(difference):
        return f"{100 * abs(difference):.1f} points"
    return metric_value(metric, abs(difference))


def plain_number(value: float) -> str:
    """Three decimals below ten, fewer above, thousands grouped from ten thousand on."""
    size = abs(value)
    if size >= 10_000:
        return f"{value:,.0f}"
    decimals = 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0
    return f"{value:.{decimals}f}"


def direction(higher_is_better: bool) -> str:
    """An arrow that points to the better side."""
    return "↑" if higher_is_better else "↓"


def byte_size(count: float) -> str:
    """A number of bytes in binary units: "812 B", "62.4 KiB", "1.21 MiB"."""
    unit, scale = byte_unit(count)
    size = count / scale
    decimals = 0 if scale == 1 or size >= 100 else 1 if size >= 10 else 2
    return f"{size:.{decimals}f} {unit}"


def byte_unit(largest: float) -> tuple[str, int]:
    """The binary unit in which an axis up to `largest` bytes is labelled, and its size in bytes."""
    power = 0
    while largest >= 1024 ** (power + 1) and power < len(_BYTE_UNITS) - 1:
        power += 1
    return _BYTE_UNITS[power], 1024**power


def duration(seconds: float) -> str:
    """A length of time: "8.4 s", "1 min 52 s", "2 h 03 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count_noun(count: int, noun: str) -> str:
    """A count with its noun: "1 client", "8 clients"; thousands grouped."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def list_names(names: Sequence[str], most: int = 6) -> str:
    """Some names and how many there are: "3 clients: a, b, c", "9 clients: a, b and 7 more"."""
    shown = names if len(names) <= most else names[: most - 1]
    more = f" and {len(names) - len(shown):,} more" if len(shown) < len(names) else ""
    return f"{count_noun(len(names), 'client')}: {', '.join(shown)}{more}"


def printable(name: str, width: int | None = None) -> str:
    """A name that came from elsewhere, safe to show.

    Control characters become "�"; a name longer than `width` is cut and ends with "…".
    """
    safe = replace_unprintable(name)
    if width is not None and len(safe) > width:
        return safe[: width - 1] + "…"
    return safe


def _key(metric: str) -> str:
    return metric.lower().replace("_", "-")
