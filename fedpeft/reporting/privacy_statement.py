"""How a report says what is protected: one statement, and epsilon round by round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedpeft.ledger.records import Promise, Round
from fedpeft.reporting.charts import Chart, ChartKey
from fedpeft.reporting.event_lines import NOT_PRIVATE
from fedpeft.reporting.summary import Summary
from fedpeft.reporting.svg import COLOUR, draw

NONE = (
    "No differential privacy: updates, losses and scores are exact, and whoever sees them may learn about the"
    " rows behind them. Rows themselves stay with their clients."
)


def privacy_statement(summary: Summary) -> list[str]:
    """What was promised, about whom, against whom, and what was spent; the first sentence is the result."""
    promise, spent = summary.started.privacy, summary.epsilon
    if promise is None:
        return [NONE]
    said = [
        f"Epsilon {spent or 0.0:.3f} at delta {promise.target_delta:g} was spent; the budget is"
        f" {promise.max_epsilon:g}.",
        f"It bounds how far anything published by this run can tell apart {promise.neighbours}.",
        f"It holds against {promise.against}.",
        *_against_observers(summary.epsilon_cohort, promise),
        f"Noise multiplier {promise.noise_multiplier:g}, sample rate {promise.sample_rate:g}; discrete"
        " Gaussian noise, Rényi accounting.",
        _describe_hidden(promise),
    ]
    if promise.seeded:
        said.insert(0, NOT_PRIVATE + ".")
    if summary.finished is not None and summary.finished.stopped:
        said.append(f"The run was {summary.finished.stopped}.")
    return said


def _against_observers(epsilon: float | None, promise: Promise) -> list[str]:
    """What remains of a promise that counts on nobody seeing the cohorts."""
    if epsilon is None:
        return []
    return [
        "It counts on nobody seeing whom the rounds asked. Against whoever does, such as one who watches the"
        f" network, it is epsilon {epsilon:.3f} at delta {promise.target_delta:g} for a client asked in every"
        " round (sample rate 1)."
    ]


def _describe_hidden(promise: Promise) -> str:
    left_out = "Losses, row counts and scores on the clients' own rows are left out"
    if promise.kind == "client-level":
        left_out += ", and who was asked, how many came, what they sent and how long a round took"
    scored = "" if promise.measured else " The run names no test set of its own, so nothing was scored."
    return f"{left_out}: they are not noised.{scored}"


def privacy_charts(summary: Summary, rounds: Sequence[Round]) -> list[Chart]:
    """Epsilon after each round, under the budget; nothing for a run without privacy."""
    promise = summary.started.privacy
    points = [(row.round, row.epsilon) for row in rounds if row.epsilon is not None]
    if promise is None or not points:
        return []
    numbers, values = [number for number, _ in points], [value for _, value in points]

    def paint(axes: Any) -> None:
        axes.axhline(promise.max_epsilon, color=COLOUR["worst"], linestyle=(0, (5, 3)), linewidth=1.4)
        axes.plot(
            numbers, values, color=COLOUR["federated"], drawstyle="steps-post", marker="o", markersize=3
        )
        axes.set_ylim(0, 1.08 * max(promise.max_epsilon, *values))
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)

    title = f"Epsilon spent, by round (delta {promise.target_delta:g})"
    alt = f"{title}: {values[-1]:.3f} after round {numbers[-1]}, the budget is {promise.max_epsilon:g}."
    legend = (ChartKey("spent so far", "federated", "line"), ChartKey("budget", "worst", "dash"))
    return [Chart(title, draw("epsilon", alt, paint), legend, f"About {promise.neighbours}.")]
