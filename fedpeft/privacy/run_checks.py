"""What a private run file may not ask for, with the reason: everything that can be known from the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedpeft.config.sections import ClientLevelPrivacy, LocalPrivacy, RecordLevelPrivacy, RunConfig
from fedpeft.errors import PrivacyError
from fedpeft.privacy.accountant import epsilon
from fedpeft.privacy.central import federation_problems
from fedpeft.privacy.kinds import budget_of, event_of


def privacy_problems(run: RunConfig) -> list[str]:
    """One line per thing that would void the promise, or make the run spend what it doesn't account for."""
    if run.privacy is None:
        user = "data.user: only record-level privacy asks whose row it is; remove it, or add [privacy]"
        return [] if run.data.user is None else [user]
    problems = [*_common(run), *_OF_KIND[run.privacy.kind](run)]
    return problems or list(_budget(run))


def delta_problem(run: RunConfig, clients: int | None) -> str | None:
    """Why a run's `target_delta` promises nothing, in one line; None if it may.

    With one over the number of protected units, publishing one unit drawn at random keeps the promise. How
    many rows (or persons) a client has is private: under record-level privacy the public guess of the run
    file stands for it, its expected batch over its sample rate.

    Args:
        clients: of the run; None: not known yet, and whoever knows asks again.
    """
    if run.privacy is None:
        return None
    units, what = (None if clients is None else float(clients)), "clients"
    if isinstance(run.privacy, RecordLevelPrivacy):
        units = run.privacy.expected_batch_size / run.privacy.sample_rate
        what = "rows (expected_batch_size over sample_rate)"
    if units is None or run.privacy.target_delta * units < 1.0:
        return None
    return (
        f"privacy.target_delta: {run.privacy.target_delta:g} came for {units:,.0f} {what}; from one over"
        f" their number on it promises nothing: give less than {1.0 / units:.2g}, better a tenth of that"
    )


def _common(run: RunConfig) -> Iterator[str]:
    kind = run.privacy.kind if run.privacy is not None else ""
    if run.evaluation.baselines:
        yield (
            "evaluation.baselines: they train on the clients' rows without noise and would be published; run"
            " them without [privacy]"
        )
    if run.model.task == "sequence-classification" and run.data.labels is None:
        yield "data.labels: classes found in the clients' rows would tell about them; list them, in order"
    if kind != "record-level" and run.data.user is not None:
        yield f"data.user: {kind} privacy protects clients, whose rows count together; remove it"
    if run.data.limit is not None and run.data.train != "embedded":
        yield (
            "data.limit: one row, or one client's rows, would decide which others are trained on; remove it"
            " (under record-level privacy a lower privacy.sample_rate takes fewer rows)"
        )
    problem = delta_problem(run, run.data.partitioner.clients)
    if problem is not None:
        yield problem


def _client_level(run: RunConfig) -> Iterator[str]:
    section = run.privacy
    if not isinstance(section, ClientLevelPrivacy):
        return
    yield from federation_problems(run.federation, max_weight=section.max_weight)
    partitioner = run.data.partitioner
    if partitioner.kind in ("natural", "files") and partitioner.clients is not None:
        yield (
            "data.partitioner.clients: the largest clients are taken, so one client would decide whether"
            " another takes part; remove it, or leave small clients out with min_rows"
        )
    if section.max_weight is not None and section.target_quantile is not None:
        yield "privacy.max_weight: adaptive clipping is accounted for uniform weights; remove one of the two"


def _record_level(run: RunConfig) -> Iterator[str]:
    section, training = run.privacy, run.training
    if not isinstance(section, RecordLevelPrivacy):
        return
    if training.steps is None:
        yield (
            "training.steps: is needed, since epochs would make the number of releases depend on how many"
            " rows a client has"
        )
    if run.data.explode is not None and run.data.user in (None, run.data.explode):
        yield (
            "data.explode: several rows of one record would each be hidden alone, not the person behind"
            " them; name the field that tells persons apart with data.user, another than the one that is"
            " exploded"
        )
    yield from _uniform(run)


def _local(run: RunConfig) -> Iterator[str]:
    if isinstance(run.privacy, LocalPrivacy):
        yield from _uniform(run)


def _uniform(run: RunConfig) -> Iterator[str]:
    if run.federation.weighting != "uniform":
        yield (
            "federation.weighting: 'examples' sends how many rows a client has, which is private; set"
            " 'uniform'"
        )


def _budget(run: RunConfig) -> Iterator[str]:
    """A budget that doesn't reach for one round is a mistake of the file, not an end of the run."""
    try:
        budget = budget_of(run)
        once = epsilon([event_of(run)], budget.target_delta)
    except PrivacyError as error:
        yield f"privacy: {error}"
        return
    if once > budget.max_epsilon:
        yield (
            f"privacy.max_epsilon: {budget.max_epsilon:g} came and one round costs {once:.4g} at delta"
            f" {budget.target_delta:g}; raise noise_multiplier or max_epsilon"
        )


_OF_KIND: dict[str, Callable[[RunConfig], Iterator[str]]] = {
    "client-level": _client_level,
    "record-level": _record_level,
    "local": _local,
}
