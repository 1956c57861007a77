"""One line per event of a run, shared by the plain and the live progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedpeft.ledger.records import Baseline, ClientOutcome, Finished, Promise, Round, Started
from fedpeft.reporting.aggregation_error import aggregation_text, ranks_text
from fedpeft.reporting.text import count_noun, duration, list_names, metric_name, metric_value, printable

NOT_PRIVATE = (
    "THIS RUN IS NOT PRIVATE: privacy.seeded draws the noise from the run's seed, for experiments that repeat"
    " themselves; epsilon is what the same run would cost with secret noise"
)
_MOST_NAMED = 5
_TROUBLES = frozenset(
    {"refused", "failed"}
)  # shown with their reason; being away or late is part of the game


def format_start(row: Started) -> str:
    """What the run is: clients, rows, and the share of parameters that is trained."""
    share = 100 * row.trainable_parameters / row.total_parameters if row.total_parameters else 0.0
    rows = "" if row.privacy else f"{count_noun(sum(row.clients.values()), 'training row')}, "
    line = (
        f"{printable(row.run_name)}: {count_noun(len(row.clients), 'client')}, "
        f"{rows}{count_noun(row.test_examples, 'test row')}; "
        f"training {row.trainable_parameters:,} of {row.total_parameters:,} parameters ({share:.2g}%)"
    )
    return line + (f"; {count_noun(row.cut_rows, 'row')} cut to the length limit" if row.cut_rows else "")


def promise_line(promise: Promise) -> str:
    """What epsilon is about, in one sentence."""
    return (
        f"{promise.kind} privacy: epsilon is about {promise.neighbours}, at delta {promise.target_delta:g},"
        f" against {promise.against}; budget {promise.max_epsilon:g}"
    )


def promise_notes(promise: Promise | None) -> list[str]:
    """What a person must know of a private run before its first round."""
    if promise is None:
        return []
    notes = [promise_line(promise)]
    if promise.seeded:
        notes.append(NOT_PRIVATE)
    if not promise.measured:
        notes.append(
            "nothing is scored: the only test rows are the clients' own, which are private; set data.test"
        )
    return notes


def attackers_text(started: Started) -> str:
    """Who attacks a simulation, and how; empty where nobody does."""
    return f"{started.attack} by {list_names(started.attackers)}" if started.attackers else ""


def attack_notes(started: Started) -> list[str]:
    """What a person must know of an attacked run before its first round."""
    return [f"under attack: {attackers_text(started)}"] if started.attackers else []


def round_line(row: Round, rounds: int, primary: str) -> str:
    """One round: the global test, training loss, clients and time."""
    head = f"round {row.round:>{len(str(rounds))}}/{rounds}" if row.round else "before training"
    parts = []
    score = row.evaluation.scores.get(primary) if row.evaluation else None
    if score is not None:
        parts.append(f"{metric_name(primary)} {metric_value(primary, score.value):>5}")
    if row.train_loss is not None:
        parts.append(f"train loss {metric_value('loss', row.train_loss)}")
    if row.aggregation is not None:
        parts.append(aggregation_text(row.aggregation))
    if ranks := ranks_text(row):
        parts.append(ranks)
    if row.epsilon is not None:
        seen = "" if row.epsilon_cohort is None else f" ({row.epsilon_cohort:.3f} where cohorts are seen)"
        parts.append(f"epsilon {row.epsilon:.3f}{seen}")
    if row.outcomes:
        parts.append(clients_text(row.outcomes))
    if row.joined:
        more = len(row.joined) - _MOST_NAMED
        names = ", ".join(map(printable, row.joined[:_MOST_NAMED]))
        parts.append(f"joined: {names}" + (f" and {more} more" if more > 0 else ""))
    if row.staleness:
        parts.append(staleness_text(row.staleness))
    if row.wall_s or row.epsilon is None:  # a secret cohort's size shows in its time, which is 0 then
        parts.append(duration(row.wall_s))
    return f"{head}  " + " · ".join(parts)


def staleness_text(counts: Sequence[int]) -> str:
    """How old the states were that a buffered round's updates started from: "staleness 1.3, 0–4"."""
    ages = [age for age, count in enumerate(counts) if count]
    mean = sum(age * counts[age] for age in ages) / sum(counts)
    spread = f", {ages[0]}–{ages[-1]}" if len(ages) > 1 else ""
    return f"staleness {mean:.2g}{spread}"


def clients_text(outcomes: tuple[ClientOutcome, ...]) -> str:
    """How many of the asked clients counted, and what became of the others: "6/8 clients (2 late)"."""
    counts = Counter(item.status for item in outcomes)
    rest = [f"{count} {status}" for status, count in sorted(counts.items()) if status != "folded"]
    return f"{counts['folded']}/{count_noun(len(outcomes), 'client')}" + (
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


def format_end(row: Finished) -> str:
    """The end of the run."""
    if row.stopped:
        return f"{row.stopped}; {duration(row.wall_s)}"
    return f"finished after {count_noun(row.rounds, 'round')} in {duration(row.wall_s)}"
