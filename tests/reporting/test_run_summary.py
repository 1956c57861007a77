"""The summary against numbers worked out by hand."""

from __future__ import annotations

import json
import math

import pytest

from fedpeft.errors import StateError
from fedpeft.ledger.records import Baseline, ClientOutcome, Evaluation, Finished, Round, Row, Score, Started
from fedpeft.reporting.clients import ClientRow, compare_with_alone
from fedpeft.reporting.summary import build_summary, metrics_of, spread_of, summary_json
from fedpeft.reporting.verdict import verdict
from tests.reporting.rows import started, whole_run


def score(value: float, low: float | None = None, high: float | None = None) -> Score:
    return Score(
        value=value, low=value if low is None else low, high=value if high is None else high, count=10
    )


def exact(value: float, low: float | None = None, high: float | None = None) -> Evaluation:
    return Evaluation(scores={"exact-match": score(value, low, high)})


def by_perplexity(row: Started) -> Started:
    return row.model_copy(update={"primary_metric": "perplexity"})


def test_alone_is_the_mean_and_the_worst_of_the_clients_models() -> None:
    local = Baseline(
        name="local",
        evaluations={"b": exact(0.2, 0.1, 0.3), "a": exact(0.5, 0.4, 0.6), "c": exact(0.8, 0.7, 1.0)},
    )
    summary = build_summary([started(), local])
    mean, worst = summary.score("alone-mean"), summary.line("alone-worst")
    assert mean is not None
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.5, 0.4, 1.9 / 3))
    assert worst is not None
    assert (worst.detail, worst.scores["exact-match"].value) == ("b", 0.2)


def test_where_lower_is_better_the_worst_is_the_highest() -> None:
    evaluations = {
        name: Evaluation(scores={"perplexity": score(value)}) for name, value in (("a", 3.0), ("b", 9.0))
    }
    summary = build_summary([by_perplexity(started()), Baseline(name="local", evaluations=evaluations)])
    worst = summary.line("alone-worst")
    assert worst is not None
    assert worst.detail == "b"


@pytest.mark.parametrize(
    ("metric", "worst", "client", "p10"), [("exact-match", 0.0, "c00", 0.1), ("loss", 1.0, "c10", 0.9)]
)
def test_spread_over_eleven_evenly_spaced_clients(metric: str, worst: float, client: str, p10: float) -> None:
    values = {f"c{index:02d}": index / 10 for index in range(11)}
    spread = spread_of(Evaluation(scores={}, clients={metric: values}), started(), metric)
    assert spread is not None
    assert (spread.worst, spread.worst_client, spread.clients) == (worst, client, 11)
    assert (spread.p10, spread.median, spread.mean) == pytest.approx((p10, 0.5, 0.5))


def test_a_client_without_a_value_is_left_out_of_the_spread() -> None:
    evaluation = Evaluation(scores={}, clients={"exact-match": {"a": math.nan, "b": 0.5}})
    spread = spread_of(evaluation, started())
    assert spread is not None
    assert (spread.worst_client, spread.clients) == ("b", 1)
    assert spread_of(Evaluation(scores={}), started()) is None


def test_federated_is_the_last_evaluated_round() -> None:
    rows: list[Row] = [
        started(),
        Round(round=3),
        Round(round=2, evaluation=exact(0.6)),
        Round(round=1, evaluation=exact(0.9)),
    ]
    summary = build_summary(rows)
    line = summary.line("federated")
    assert line is not None
    assert (line.detail, line.scores["exact-match"].value, summary.rounds_done) == ("round 2", 0.6, 3)


def test_round_zero_stands_for_the_base_model_only_without_a_zero_shot_baseline() -> None:
    start = Round(round=0, evaluation=exact(0.05))
    zero_shot = Baseline(name="zero-shot", evaluations={"zero-shot": exact(0.04)})
    assert [line.key for line in build_summary([started(), start]).lines] == ["start"]
    assert [line.key for line in build_summary([started(), start, zero_shot]).lines] == ["zero-shot"]


def test_of_two_rows_of_one_round_the_later_counts() -> None:
    rows: list[Row] = [
        started(),
        Round(round=1, evaluation=exact(0.1)),
        Round(round=1, evaluation=exact(0.2)),
    ]
    federated = build_summary(rows).score("federated")
    assert federated is not None
    assert federated.value == 0.2


def test_traffic_before_the_end_is_counted_from_the_outcomes() -> None:
    outcomes = (
        ClientOutcome(client="a", status="folded", bytes_up=100, bytes_down=10),
        ClientOutcome(client="b", status="late", bytes_up=200, bytes_down=10),
        ClientOutcome(client="c", status="unavailable"),
    )
    again = (ClientOutcome(client="a", status="folded", bytes_up=300, bytes_down=40),)
    traffic = build_summary(
        [started(), Round(round=1, outcomes=outcomes), Round(round=2, outcomes=again)]
    ).traffic
    assert traffic is not None
    assert (traffic.up_total, traffic.down_total) == (200.0, 20.0)  # three clients were asked
    assert (traffic.up_round, traffic.down_round) == (200.0, 20.0)  # three transfers each way


def test_the_last_row_has_the_last_word_on_bytes_and_time() -> None:
    end = Finished(
        rounds=1, adapter_digest="ff", bytes_up_per_client=7.0, bytes_down_per_client=8.0, wall_s=99.0
    )
    summary = build_summary([started(), Round(round=1, wall_s=3.0), end])
    assert summary.traffic is not None
    assert (summary.traffic.up_total, summary.traffic.down_total, summary.wall_s) == (7.0, 8.0, 99.0)
    unfinished = build_summary([started(), Round(round=1, wall_s=3.0), Round(round=2, wall_s=4.5)])
    assert (unfinished.wall_s, unfinished.traffic) == (7.5, None)


def test_rows_without_a_beginning_are_refused() -> None:
    with pytest.raises(StateError, match="no 'started' row"):
        build_summary([Round(round=1)])


def test_the_primary_metric_comes_first() -> None:
    assert metrics_of(build_summary(whole_run())) == ["exact-match", "loss", "perplexity"]


def test_json_holds_no_infinity() -> None:
    rows: list[Row] = [started(), Round(round=1, evaluation=exact(math.inf))]
    plain = json.loads(json.dumps(summary_json(build_summary(rows)), allow_nan=False))
    assert plain["models"]["federated"]["scores"]["exact-match"]["value"] is None
    whole = json.loads(json.dumps(summary_json(build_summary(whole_run())), allow_nan=False))
    assert list(whole["models"]) == ["zero-shot", "alone-mean", "alone-worst", "federated", "pooled"]
    assert whole["bytes_per_client"]["up_total"] == 2_990_000.0


def verdict_of(federated: Evaluation, alone: Evaluation) -> str:
    end = Finished(rounds=1, adapter_digest="ff", bytes_up_per_client=7.0, bytes_down_per_client=8.0)
    local = Baseline(name="local", evaluations={"a": alone})
    return verdict(build_summary([started(rounds=1), Round(round=1, evaluation=federated), local, end]))


def test_the_verdict_says_better_worse_and_whether_the_intervals_part() -> None:
    assert "50.0 points better than the mean client that trained alone." in verdict_of(
        exact(0.7, 0.6, 0.8), exact(0.2, 0.1, 0.3)
    )
    assert "5.0 points worse than the mean client that trained alone (within the intervals)." in verdict_of(
        exact(0.5, 0.4, 0.6), exact(0.55, 0.45, 0.65)
    )
    assert "level with the mean client" in verdict_of(exact(0.5), exact(0.5))


def test_the_verdict_turns_round_where_lower_is_better() -> None:
    rows: list[Row] = [
        by_perplexity(started()),
        Round(round=1, evaluation=Evaluation(scores={"perplexity": score(3.0)})),
        Baseline(name="pooled", evaluations={"pooled": Evaluation(scores={"perplexity": score(2.5)})}),
    ]
    sentence = verdict(build_summary(rows))
    assert "0.500 worse than one model trained on the pooled data" in sentence
    assert "not finished: 1 of 12 rounds" in sentence


@pytest.mark.parametrize(
    ("held_back", "words"), [(False, "on the test set"), (True, "on the rows that clients held back")]
)
def test_the_verdict_says_on_whose_rows(held_back: bool, words: str) -> None:
    rows: list[Row] = [started(test_of_clients=held_back), Round(round=1, evaluation=exact(0.5))]
    assert f"reached 50.0% exact match {words}." in verdict(build_summary(rows))


def test_ties_are_neither_better_nor_worse() -> None:
    federated = {"a": 0.5, "b": 0.5, "c": 0.25, "d": 0.75}
    alone = {"a": 0.25, "b": 0.5, "c": 0.5, "d": 0.75}
    rows = [ClientRow(name, 10, federated[name], alone[name], 1, 1, 0, 0) for name in federated]
    said = compare_with_alone(build_summary([started(), Round(round=1, evaluation=exact(0.5))]), rows)
    assert said.endswith("better for 1, equal for 2 and worse for 1 of 4 clients.")


def test_the_verdict_does_not_invent_a_result() -> None:
    assert (
        verdict(build_summary([started()]))
        == "No training round has been evaluated yet (0 of 12 rounds done)."
    )
