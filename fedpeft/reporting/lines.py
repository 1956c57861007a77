"""One line per event of a run, shared by the plain and the live progress."""

from __future__ import annotations

from collections import Counter

from fedpeft.records import Baseline, ClientOutcome, Finished, Round, Started
from fedpeft.reporting.text import counted, duration, metric_name, metric_value, printable

_TROUBLES = frozenset(
    {"refused", "failed"}
)  # shown with their reason; being away or late is part of the game


def started_line(row: Started) -> str:
    """What the run is: clients, rows, and the share of parameters that is trained."""
    share = 100 * row.trainable_parameters / row.total_parameters if row.total_parameters else 0.0
    line = (
        f"{printable(row.run_name)}: {counted(len(row.clients), 'client')}, "
        f"{counted(sum(row.clients.values()), 'training row')}, {counted(row.test_examples, 'test row')}; "
        f"training {row.trainable_parameters:,} of {row.total_parameters:,} parameters ({share:.2g}%)"
    )
    return line + (f"; {counted(row.cut_rows, 'row')} cut to the length limit" if row.cut_rows else "")


def round_line(row: Round, rounds: int, primary: str) -> str:
    """One round: the global test, training loss, clients and time."""
    head = f"round {row.round:>{len(str(rounds))}}/{rounds}" if row.round else "before training"
    parts = []
    score = row.evaluation.scores.get(primary) if row.evaluation else None
    if score is not None:
        parts.append(f"{metric_name(primary)} {metric_value(primary, score.value):>5}")
    if row.train_loss is not None:
        parts.append(f"train loss {metric_value('loss', row.train_loss)}")
    if row.outcomes:
        parts.append(clients_text(row.outcomes))
    return f"{head}  " + " · ".join([*parts, duration(row.wall_s)])


def clients_text(outcomes: tuple[ClientOutcome, ...]) -> str:
    """How many of the asked clients counted, and what became of the others: "6/8 clients (2 late)"."""
    counts = Counter(item.status for item in outcomes)
    rest = [f"{count} {status}" for status, count in sorted(counts.items()) if status != "folded"]
    return f"{counts['folded']}/{counted(len(outcomes), 'client')}" + (
        f" ({', '.join(rest)})" if rest else ""
    )


def trouble_line(outcome: ClientOutcome) -> str | None:
    """A client whose update was refused or that failed, with the reason; None for all others."""
    if outcome.status not in _TROUBLES:
        return None
    reason = f": {printable(outcome.reason)}" if outcome.reason else ""
    return f"{printable(outcome.client)} {outcome.status}{reason}"


def baseline_line(row: Baseline, primary: str) -> str:
    """A finished baseline: its value, or the mean over its models."""
    values = [item.scores[primary].value for item in row.evaluations.values() if primary in item.scores]
    mean = sum(values) / len(values) if values else None
    return (
        f"baseline {row.name}  {metric_name(primary)} {metric_value(primary, mean)} · {duration(row.wall_s)}"
    )


def finished_line(row: Finished) -> str:
    """The end of the run."""
    return f"finished after {counted(row.rounds, 'round')} in {duration(row.wall_s)}"
