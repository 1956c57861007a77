"""The summary as a table for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from fedpeft.ledger.records import Score
from fedpeft.reporting.summary import ModelLine, Summary, higher_is_better, mean_staleness, metrics_of
from fedpeft.reporting.text import (
    MISSING,
    byte_size,
    count_noun,
    direction,
    duration,
    metric_name,
    metric_value,
    printable,
)

_WIDTH = 80
_FIXED_WIDTH = 2 + 25 + 15  # margins, the models' names, the interval
_VALUE_WIDTH = 9


def summary_table(summary: Summary) -> Table:
    """The outcome at a glance: models on the global test set, the federated model over the clients, the cost.

    Arrows point to the better side. It fits 80 columns: metrics beyond the primary one are shown as far as
    there is room for them.
    """
    metrics = metrics_of(summary)
    primary, others = metrics[0], _fitting(metrics)
    table = Table(title=_title(summary), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("on the global test set", no_wrap=True, min_width=24)
    table.add_column(_heading(summary, primary), justify="right", no_wrap=True, min_width=10)
    table.add_column("95% interval", no_wrap=True, min_width=13, style="dim")
    for metric in others:
        table.add_column(_heading(summary, metric), justify="right", no_wrap=True, style="dim")
    for line in summary.lines:
        _add_line(table, line, primary, others)
    _add_spread(table, summary)
    _add_cost(table, summary)
    return table


def _fitting(metrics: list[str]) -> list[str]:
    """The metrics after the first whose columns fit beside it."""
    widths = [max(len(metric_name(metric)) + 2, _VALUE_WIDTH) + 1 for metric in metrics]
    room, others = _WIDTH - _FIXED_WIDTH - widths[0], []
    for metric, width in zip(metrics[1:], widths[1:], strict=True):
        room -= width
        if room < 0:
            break
        others.append(metric)
    return others


def interval(metric: str, score: Score | None) -> str:
    """The 95% interval in the metric's unit: "34.1–41.0%"."""
    if score is None:
        return MISSING
    low, high = metric_value(metric, score.low), metric_value(metric, score.high)
    return f"{low.removesuffix('%')}–{high}"


def _title(summary: Summary) -> Text:
    started, done = summary.started, summary.rounds_done
    rounds = count_noun(done, "round") if done == started.rounds else f"{done} of {started.rounds} rounds"
    parts = [
        printable(started.run_name),
        count_noun(len(started.clients), "client"),
        rounds,
        f"seed {started.seed}",
    ]
    return Text(" · ".join(parts), style="bold")


def _heading(summary: Summary, metric: str) -> Text:
    return Text(f"{metric_name(metric)} {direction(higher_is_better(summary.started, metric))}")


def _add_line(table: Table, line: ModelLine, primary: str, others: list[str]) -> None:
    """One model on the global test set."""
    score = line.scores.get(primary)
    values = [line.scores.get(metric) for metric in others]
    table.add_row(
        line.label,
        metric_value(primary, score.value if score else None),
        interval(primary, score),
        *(
            metric_value(name, value.value if value else None)
            for name, value in zip(others, values, strict=True)
        ),
        style="bold green" if line.key == "federated" else None,
    )


def _add_spread(table: Table, summary: Summary) -> None:
    """The federated model on each client's own held-out rows; names go in as `Text`, never read as markup."""
    spread, metric = summary.spread, summary.primary
    if spread is None:
        return
    table.add_section()
    table.add_row(Text("federated, on own data", style="italic"))
    for label, value, detail in (
        ("worst client", spread.worst, printable(spread.worst_client, 14)),
        ("10th percentile", spread.p10, ""),
        ("median client", spread.median, f"of {spread.clients:,}"),
    ):
        table.add_row(f"  {label}", metric_value(metric, value), Text(detail))


def _add_cost(table: Table, summary: Summary) -> None:
    """What the run took: bytes per client and time."""
    table.add_section()
    traffic, promise = summary.traffic, summary.started.privacy
    if promise is not None:
        label = "epsilon, NOT PRIVATE" if promise.seeded else "epsilon"
        table.add_row(label, f"{summary.epsilon or 0.0:.3f}", f"delta {promise.target_delta:g}")
        if summary.epsilon_cohort is not None:
            table.add_row("  where cohorts are seen", f"{summary.epsilon_cohort:.3f}", "sample rate 1")
    if traffic is not None:
        for label, total, each in (
            ("bytes up per client", traffic.up_total, traffic.up_round),
            ("bytes down per client", traffic.down_total, traffic.down_round),
        ):
            table.add_row(label, byte_size(total), f"{byte_size(each)}/round")
        for journey in summary.journeys:
            if journey.cosine is not None:
                label, lost = f"  {journey.direction}, against bf16", f"cosine {journey.cosine:.3f}"
                table.add_row(label, f"{journey.saving:.1f}x less", lost)
    if summary.staleness:
        mean = mean_staleness(summary.staleness)
        table.add_row("staleness, mean", f"{mean:.2g}", f"at most {len(summary.staleness) - 1} rounds")
    table.add_row("wall time", duration(summary.wall_s), "" if summary.finished else "so far")
