"""The round loop: ours, so that it can be stopped at any instant and go on from the last committed round."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedpeft.config import RunConfig
from fedpeft.errors import FederationError, FedPEFTError, UpdateError
from fedpeft.flower.cohort import Cohort, draw_cohort
from fedpeft.flower.exchange import exchange
from fedpeft.flower.roster import Roster
from fedpeft.flower.strategies import Aggregator, StrategyRunner, proximal_mu
from fedpeft.flower.tasks import TRAIN, Task, read_update, task_content
from fedpeft.ledger import Checkpoint
from fedpeft.records import ClientOutcome, Evaluation, Round
from fedpeft.sampling import cohort_size
from fedpeft.spaces import Space
from fedpeft.stages import Stage, StageContext, on_server, promised_payload, stage_list
from fedpeft.update import Arrays, Update, arrays_digest, layout_of
from fedpeft.wire.codec import Envelope, decode, encode


class Journal(Protocol):
    """Where rounds become durable."""

    def commit(self, checkpoint: Checkpoint) -> None:
        """Make the round durable before this returns."""
        ...


class Observer(Protocol):
    """Who is told how the rounds go."""

    def round_started(self, number: int, asked: int) -> None:
        """A round begins with so many asked clients."""
        ...

    def client_done(self, outcome: ClientOutcome) -> None:
        """One asked client is done, whatever became of it."""
        ...

    def round_done(self, row: Round) -> None:
        """The round is committed."""
        ...


class ClientMemory(Protocol):
    """What simulated clients remember between rounds; real agents keep theirs themselves."""

    def memory(self) -> dict[str, NDArray[Any]]:
        """All of it, by ``"<node>/<array>"``."""
        ...

    def restore_memory(self, memory: Mapping[str, NDArray[Any]]) -> None:
        """Put it back after a restart."""
        ...


@dataclass(frozen=True)
class Federation:
    """Everything that a run's rounds need.

    Attributes:
        evaluate: the global state's evaluation, called as often as the run file says.
        run_json: sent along with tasks where clients may not hold the run file; empty where they do.
        timeout_s: how long a round waits for answers, in real seconds; None where time is virtual.
        memory: the grid's client memory, where it keeps one.
    """

    run: RunConfig
    digest: str
    grid: Grid
    roster: Roster
    space: Space
    stages: tuple[Stage, ...]
    journal: Journal
    observer: Observer
    evaluate: Callable[[Arrays], Evaluation | None]
    run_json: str = ""
    timeout_s: float | None = None
    memory: ClientMemory | None = None

    @functools.cached_property
    def stage_list(self) -> tuple[tuple[str, str], ...]:
        """The stages as every update must name them; written out once, not once per reply."""
        return stage_list(self.stages)


@dataclass
class _Collected:
    """A round's outcomes so far."""

    outcomes: list[ClientOutcome] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)  # weight, loss
    errors: list[FedPEFTError] = field(default_factory=list)


def initial_checkpoint(federation: Federation, state: Arrays) -> Checkpoint:
    """Round 0: the start and its evaluation, committed."""
    started = time.monotonic()
    evaluation = federation.evaluate(state)
    row = Round(round=0, evaluation=evaluation, wall_s=time.monotonic() - started)
    checkpoint = Checkpoint(federation.digest, 0, state, row)
    federation.journal.commit(checkpoint)
    federation.observer.round_done(row)
    return checkpoint


def run_rounds(federation: Federation, checkpoint: Checkpoint) -> Checkpoint:
    """All rounds after `checkpoint`, each committed before the next begins; the last one's checkpoint.

    Raises:
        FederationError: no quorum, or too few updates for the strategy. What was committed stays.
        FedPEFTError: what the clients failed with, if no quorum was left because of it.
    """
    run = federation.run
    layout = federation.space.update_layout(layout_of(checkpoint.state))
    cohort = cohort_size(run.federation.sampling, len(federation.roster.members))
    strategy = StrategyRunner(run, layout, cohort)
    strategy.restore(checkpoint.strategy)
    if federation.memory is not None:
        federation.memory.restore_memory(checkpoint.clients)
    while checkpoint.round < run.run.rounds:
        checkpoint = _round(federation, strategy, checkpoint)
    return checkpoint


def _round(federation: Federation, strategy: StrategyRunner, before: Checkpoint) -> Checkpoint:
    """One round: ask, collect, close, evaluate, commit."""
    started = time.monotonic()
    number = before.round + 1
    state_digest = arrays_digest(before.state)
    payload = _state_payload(federation, before, number, state_digest)
    cohort = draw_cohort(
        federation.run,
        federation.roster,
        number,
        bytes_down=len(payload),
        bytes_up=_expected_bytes(before, payload),
    )
    federation.observer.round_started(number, len(cohort.asked))
    aggregator = strategy.begin(number, capacity=max(1, len(cohort.working)))
    collected = _collect(federation, aggregator, cohort, number, payload, state_digest)
    _check_quorum(federation, cohort, collected, number)
    folded = sum(outcome.status == "folded" for outcome in collected.outcomes)
    change = aggregator.close() if folded else {}
    state = federation.space.apply(before.state, change) if folded else before.state
    due = number % federation.run.evaluation.every == 0 or number == federation.run.run.rounds
    row = Round(
        round=number,
        outcomes=tuple(sorted((*collected.outcomes, *cohort.lost), key=lambda outcome: outcome.client)),
        train_loss=_weighted_mean(collected.losses),
        state_norm_change=_norm(change),
        evaluation=federation.evaluate(state) if due else None,
        virtual_s=cohort.virtual_s,
        notes=() if folded else ("nobody was sampled; the state stays as it is",),
        wall_s=time.monotonic() - started,
    )
    clients = federation.memory.memory() if federation.memory is not None else {}
    after = Checkpoint(federation.digest, number, state, row, strategy.memory(), clients)
    federation.journal.commit(after)
    federation.observer.round_done(row)
    return after


def _state_payload(federation: Federation, before: Checkpoint, number: int, state_digest: str) -> bytes:
    return encode(
        Envelope(
            arrays=before.state,
            run_digest=federation.digest,
            round=number,
            state_digest=state_digest,
            space=federation.space.kind,
            base_digest=federation.roster.base_digest,
        )
    )


def _expected_bytes(before: Checkpoint, payload: bytes) -> int:
    """What an update will weigh: the mean of the round before; at first, as much as the state."""
    sizes = [outcome.bytes_up for outcome in before.row.outcomes if outcome.bytes_up]
    return round(sum(sizes) / len(sizes)) if sizes else len(payload)


def _collect(
    federation: Federation,
    aggregator: Aggregator,
    cohort: Cohort,
    number: int,
    payload: bytes,
    state_digest: str,
) -> _Collected:
    """Send the tasks and fold the replies as they arrive."""
    content = task_content(
        Task(
            run_digest=federation.digest,
            round=number,
            state=payload,
            run_json=federation.run_json,
            proximal_mu=proximal_mu(federation.run.federation.strategy),
        )
    )
    names = {federation.roster.members[name].node_id: name for name in cohort.working}
    messages = [Message(content, node, TRAIN, group_id=str(number)) for node in sorted(names)]
    collected = _Collected()
    timeout_s = federation.timeout_s
    silent = dict(names)
    for reply in exchange(federation.grid, messages, timeout_s=timeout_s):
        name = silent.pop(reply.metadata.src_node_id)
        outcome = _count(federation, aggregator, reply, name, number, len(payload), state_digest, collected)
        if federation.run.federation.clock is not None:
            outcome = outcome.model_copy(update={"virtual_s": cohort.working[name]})
        _note(federation, collected, outcome)
    for name in silent.values():
        _note(
            federation,
            collected,
            ClientOutcome(client=name, status="late", reason=f"no answer in {timeout_s:g} s"),
        )
    return collected


def _note(federation: Federation, collected: _Collected, outcome: ClientOutcome) -> None:
    collected.outcomes.append(outcome)
    federation.observer.client_done(outcome)


def _count(
    federation: Federation,
    aggregator: Aggregator,
    reply: Message,
    name: str,
    number: int,
    bytes_down: int,
    state_digest: str,
    collected: _Collected,
) -> ClientOutcome:
    """Check one reply, undo its stages, fold it in. Whatever is wrong with it stays with its sender."""
    payload = b""
    try:
        payload = read_update(reply)
        envelope = _checked(federation, payload, name, number, state_digest, aggregator)
        context = StageContext(federation.run.run.seed, number, name)
        metrics = {key: value for key, value in envelope.metrics.items() if math.isfinite(value)}
        came = Update(envelope.arrays, envelope.weight, metrics, envelope.encoded)
        update = on_server(federation.stages, came, context)
        federation.space.check(update.arrays, who=name)
        norm = aggregator.fold(name, update)
    except FedPEFTError as error:
        collected.errors.append(error)
        status = "refused" if payload else "failed"
        return ClientOutcome(
            client=name,
            status=status,
            reason=str(error),
            bytes_up=len(payload),
            bytes_down=bytes_down,
        )
    if "loss" in metrics:
        collected.losses.append((update.weight, metrics["loss"]))
    return ClientOutcome(
        client=name,
        status="folded",
        examples=int(metrics.get("examples", 0)),
        steps=int(metrics.get("steps", 0)),
        loss=metrics.get("loss"),
        bytes_up=len(payload),
        bytes_down=bytes_down,
        update_norm=norm,
        distortion=metrics.get("distortion"),
        cosine=metrics.get("cosine"),
    )


def _checked(
    federation: Federation, payload: bytes, name: str, number: int, state_digest: str, aggregator: Aggregator
) -> Envelope:
    """Decode an update and refuse one that is not this client's answer to this round's task."""
    promised = promised_payload(federation.stages)
    envelope = decode(payload, who=name, layout=aggregator.layout, expect=promised)
    expected = {
        "run": (envelope.run_digest, federation.digest),
        "round": (envelope.round, number),
        "client": (envelope.client, name),
        "state": (envelope.state_digest, state_digest),
        "space": (envelope.space, federation.space.kind),
        "base model": (envelope.base_digest, federation.roster.base_digest),
        "stages": (envelope.stages, federation.stage_list),
    }
    for what, (came, wanted) in expected.items():
        if came != wanted:
            raise UpdateError(
                f"{name}: an update of {what} {str(came)[:20]!r} came, {str(wanted)[:20]!r} was asked for"
            )
    return envelope


def _check_quorum(federation: Federation, cohort: Cohort, collected: _Collected, number: int) -> None:
    """Stop the run when too few of the asked clients counted, with the first client's own error."""
    needed = math.ceil(federation.run.federation.quorum * len(cohort.asked))
    folded = sum(outcome.status == "folded" for outcome in collected.outcomes)
    if folded >= needed:
        return
    outcomes = (*collected.outcomes, *cohort.lost)
    summary = f"round {number}: {folded} of {len(cohort.asked)} clients counted, the quorum is {needed}"
    if collected.errors:
        first = min(
            (o for o in outcomes if o.status in ("failed", "refused")), key=lambda outcome: outcome.client
        )
        kind = type(collected.errors[0])
        raise kind(f"{summary}; {first.client}: {first.reason}")
    raise FederationError(
        f"{summary}; raise federation.deadline_s or over_selection, or lower federation.quorum"
    )


def _weighted_mean(losses: list[tuple[int, float]]) -> float | None:
    total = sum(weight for weight, _ in losses)
    return math.fsum(weight * loss for weight, loss in losses) / total if total else None


def _norm(change: Mapping[str, NDArray[np.floating[Any]]]) -> float:
    return math.sqrt(math.fsum(float(np.sum(np.square(array))) for array in change.values()))
