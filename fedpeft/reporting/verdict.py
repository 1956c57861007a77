"""One or two sentences that say how a run came out, computed from its summary."""

from __future__ import annotations

from fedpeft.ledger.records import Score
from fedpeft.reporting.summary import LineKey, Summary, higher_is_better
from fedpeft.reporting.text import count_noun, metric_difference, metric_name, metric_value

# Whom the federated model is compared with, and what that model is called within a sentence.
_RIVALS: tuple[tuple[LineKey, str], ...] = (
    ("alone-mean", "the mean client that trained alone"),
    ("pooled", "one model trained on the pooled data"),
)
_STARTS: tuple[tuple[LineKey, str], ...] = (
    ("zero-shot", "of the base model"),
    ("start", "before training"),
)


def verdict(summary: Summary) -> str:
    """How the run came out, in words.

    A difference counts as clear only if the two 95% intervals do not overlap, which is stricter than a test
    of the difference; the words "within the intervals" mark the others.
    """
    federated, planned = summary.score("federated"), summary.started.rounds
    if federated is None and summary.finished is not None:
        return f"{_describe_end(summary)} Nothing was scored: there is no test set."
    if federated is None:
        return f"No training round has been evaluated yet ({summary.rounds_done} of {planned} rounds done)."
    name, value = metric_name(summary.primary), metric_value(summary.primary, federated.value)
    clients = count_noun(len(summary.started.clients), "client")
    rows = "the rows that clients held back" if summary.started.test_of_clients else "the test set"
    sentences = [f"Federated training of {clients} reached {value} {name} on {rows}{_start(summary)}."]
    compared = [text for key, rival in _RIVALS if (text := _compare(summary, federated, key, rival))]
    if compared:
        sentences.append(f"It is {' and '.join(compared)}.")
    if summary.started.privacy is not None or (summary.finished is not None and summary.finished.stopped):
        sentences.append(_describe_end(summary))
    if summary.finished is None:
        sentences.append(f"The run is not finished: {summary.rounds_done} of {planned} rounds done.")
    return " ".join(sentences)


def _describe_end(summary: Summary) -> str:
    """How far the run came, and what of its privacy budget that took."""
    stopped = summary.finished.stopped if summary.finished is not None else ""
    done = f"The run was {stopped}." if stopped else f"{count_noun(summary.rounds_done, 'round')} are done."
    promise = summary.started.privacy
    if promise is None:
        return done
    spent = f"Epsilon {summary.epsilon or 0.0:.3f} at delta {promise.target_delta:g} is spent"
    simulated = ", with SIMULATED noise that hides nothing" if promise.seeded else ""
    return f"{done} {spent} ({promise.kind}){simulated}."


def _start(summary: Summary) -> str:
    """Where the base model stood."""
    for key, text in _STARTS:
        score = summary.score(key)
        if score is not None:
            return f", from {metric_value(summary.primary, score.value)} {text}"
    return ""


def _compare(summary: Summary, federated: Score, key: LineKey, rival: str) -> str | None:
    other = summary.score(key)
    if other is None:
        return None
    higher = higher_is_better(summary.started, summary.primary)
    gain = (federated.value - other.value) * (1 if higher else -1)
    size = metric_difference(summary.primary, gain)
    if gain == 0:
        return f"level with {rival}"
    clear = federated.low > other.high or federated.high < other.low
    return f"{size} {'better' if gain > 0 else 'worse'} than {rival}" + (
        "" if clear else " (within the intervals)"
    )
