"""The tables of RESULTS.md, from finished run folders.

    python simulations/results_table.py DIR [DIR ...]     (a second, one core)

Expected: for each folder that `fedpeft simulate --out DIR` finished, a heading, what the run was, and three
markdown tables: models on the global test set, the federated model over the clients and over the rounds, and
the bytes. Every number comes from the folder's `metrics.jsonl`; nothing is computed here beyond what the
report shows.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedpeft.ledger.records import Baseline, Evaluation, Finished, Row, parse_row
from fedpeft.reporting.summary import (
    LABELS,
    ModelLine,
    Spread,
    Summary,
    build_summary,
    last_evaluated,
    metrics_of,
    rounds_in_order,
    spread_of,
)
from fedpeft.reporting.text import byte_size, duration, metric_name, metric_value

_CURVE_POINTS = 8  # columns of the table over rounds, the first and the last round among them


def read_rows(folder: Path) -> list[Row]:
    """The rows of a run folder, which must be finished."""
    rows = [parse_row(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    if not any(isinstance(row, Finished) for row in rows):
        raise SystemExit(f"{folder} is not a finished run; go on with it: fedpeft simulate --resume {folder}")
    return rows


def section(rows: Sequence[Row]) -> Iterator[str]:
    """One run as lines of markdown."""
    summary = build_summary(rows)
    yield from _facts(summary)
    yield from _models(summary)
    yield from _clients(rows, summary)
    yield from _rounds(rows, summary)
    yield from _bytes(summary)


def _facts(summary: Summary) -> Iterator[str]:
    started = summary.started
    sizes = sorted(started.clients.values())
    trained, parameters = started.trainable_parameters, started.total_parameters
    yield f"## {started.run_name}\n"
    yield f"- seed {started.seed}, {summary.rounds_done} rounds, engine `{started.engine}`"
    yield f"- {len(sizes)} clients, training rows {sizes[0]:,} (fewest) to {sizes[-1]:,} (most)"
    yield f"- {started.test_examples:,} test rows"
    yield f"- {trained:,} trained parameters of {parameters:,} ({trained / parameters:.1%})"
    yield f"- {started.cut_rows:,} rows cut at the length limit"
    yield f"- wall time {duration(summary.wall_s)}, baselines included"
    yield "- " + ", ".join(f"{name} {version}" for name, version in started.versions.items())
    if summary.finished is not None:
        yield f"- adapter digest `{summary.finished.adapter_digest[:16]}`\n"


def _models(summary: Summary) -> Iterator[str]:
    metrics = metrics_of(summary)
    yield _row(["on the global test set", *(_heading(summary, metric) for metric in metrics)])
    yield _row(["---", *("---:" for _ in metrics)])
    for line in summary.lines:
        yield _row([_label(line), *(_with_interval(line, metric) for metric in metrics)])
    yield ""


def _clients(rows: Sequence[Row], summary: Summary) -> Iterator[str]:
    """Before and after, over the clients' own held-out rows."""
    rounds, started = rounds_in_order(rows), summary.started
    last = last_evaluated(rounds)
    if last is None or summary.spread is None:
        return
    evaluations = {
        "before training": rounds[0].evaluation,
        "each client alone": _own_models(rows),
        "federated": last.evaluation,
    }
    yield _row(["each client's own held-out rows", "worst", "10th percentile", "median", "mean"])
    yield _row(["---", *["---:"] * 4])
    for metric in metrics_of(summary)[:2]:
        for name, evaluation in evaluations.items():
            spread = spread_of(evaluation, started, metric)
            if spread is not None:
                some = f" ({spread.clients} of them)" if spread.clients < len(started.clients) else ""
                yield _row([f"{name}{some}, {_heading(summary, metric)}", *_spread_cells(metric, spread)])
    yield ""


def _own_models(rows: Sequence[Row]) -> Evaluation | None:
    """Each client's own model on its own rows; None or empty where the run has not scored that."""
    local = next((row for row in rows if isinstance(row, Baseline) and row.name == "local"), None)
    if local is None:
        return None
    clients: dict[str, dict[str, float]] = {}
    for name, evaluation in local.evaluations.items():
        for metric, values in evaluation.clients.items():
            if name in values:
                clients.setdefault(metric, {})[name] = values[name]
    return Evaluation(scores={}, clients=clients)


def _spread_cells(metric: str, spread: Spread) -> list[str]:
    values = [metric_value(metric, value) for value in (spread.worst, spread.p10, spread.median, spread.mean)]
    return [f"{values[0]} ({spread.worst_client})", *values[1:]]


def _rounds(rows: Sequence[Row], summary: Summary) -> Iterator[str]:
    """The primary metric and the training loss over some of the evaluated rounds."""
    rounds = [row for row in rounds_in_order(rows) if row.evaluation is not None]
    picked = {round(i * (len(rounds) - 1) / (_CURVE_POINTS - 1)) for i in range(_CURVE_POINTS)}
    shown = [rounds[place] for place in sorted(picked)]
    yield _row(["round", *(str(row.round) for row in shown)])
    yield _row(["---", *("---:" for _ in shown)])
    for metric in dict.fromkeys((summary.primary, "loss")):
        scores = [row.evaluation.scores[metric] if row.evaluation else None for row in shown]
        values = [metric_value(metric, score.value if score else None) for score in scores]
        yield _row([f"test {_heading(summary, metric)}", *values])
    yield _row(["training loss", *(metric_value("loss", row.train_loss) for row in shown)])
    yield ""


def _bytes(summary: Summary) -> Iterator[str]:
    traffic = summary.traffic
    if traffic is None:
        return
    yield _row(["bytes per client", "a round", "the run"])
    yield _row(["---", "---:", "---:"])
    yield _row(["up", byte_size(traffic.up_round), byte_size(traffic.up_total)])
    yield _row(["down", byte_size(traffic.down_round), byte_size(traffic.down_total)])


def _label(line: ModelLine) -> str:
    name = f"**{LABELS[line.key]}**" if line.key == "federated" else LABELS[line.key]
    return f"{name} ({line.detail})" if line.key == "alone-worst" else name


def _heading(summary: Summary, metric: str) -> str:
    return f"{metric_name(metric)} {'↑' if summary.started.higher_is_better[metric] else '↓'}"


def _with_interval(line: ModelLine, metric: str) -> str:
    score = line.scores.get(metric)
    if score is None:
        return "–"
    low, value, high = (metric_value(metric, part) for part in (score.low, score.value, score.high))
    return f"{value} ({low.removesuffix('%')} to {high})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(folders: Sequence[str]) -> None:
    """Print a section for each folder."""
    if not folders:
        raise SystemExit(f"{__doc__}")
    for folder in folders:
        print("\n".join(section(read_rows(Path(folder)))), end="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
