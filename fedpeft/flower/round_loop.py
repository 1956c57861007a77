"""The round loop: ours, so that it can be stopped at any instant and go on from the last committed round."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from fedpeft.config import RunConfig
from fedpeft.errors import FederationError, FedPEFTError, QuorumError, UpdateError
from fedpeft.flower.broadcast import Broadcast, Outgoing, WholeStates
from fedpeft.flower.cohort import draw_cohort
from fedpeft.flower.exact_steps import steps_of
from fedpeft.flower.exchange import exchange
from fedpeft.flower.legs import header_bytes, leg_down, leg_up
from fedpeft.flower.private_rounds import BudgetStore, RoundPrivacy, open_privacy
from fedpeft.flower.roster import Roster
from fedpeft.flower.scalars import scalars_in, scalars_of
from fedpeft.flower.steps import Step
from fedpeft.flower.strategies import Aggregator, StrategyRunner, proximal_mu
from fedpeft.flower.tasks import TRAIN, Task, read_update, task_content
from fedpeft.ledger import Checkpoint, Cohort
from fedpeft.records import ClientOutcome, Evaluation, Round
from fedpeft.sampling import cohort_size
from fedpeft.spaces import Space
from fedpeft.stages import Stage, StageContext, check_touched, on_server, promised_payload, stage_list
from fedpeft.update import Arrays, Update, arrays_digest, layout_of
from fedpeft.wire.codec import Envelope, decode, encode


class Journal(Protocol):
    """Where rounds become durable."""

    def open_round(self, number: int, draw: Callable[[], Cohort]) -> Cohort:
        """The cohort of a round that begins, before anyone is asked; the same again after a restart in it.

        Args:
            draw: draws it; a journal that has it from before doesn't call this.
        """
        ...

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
        downlink: the stage that compresses the state's way down; None: the whole state travels.
        budget: where a private run's ledger lies; other runs need none.
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
    downlink: Stage | None = None
    budget: BudgetStore | None = None

    @functools.cached_property
    def stage_list(self) -> tuple[tuple[str, str], ...]:
        """The stages as every update must name them; written out once, not once per reply."""
        return stage_list(self.stages)


@dataclass
class _Collected:
    """A round's outcomes so far, from the state that it began with."""

    state: Arrays
    outcomes: list[ClientOutcome] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)  # weight, loss
    errors: list[FedPEFTError] = field(default_factory=list)
    scalars: list[NDArray[np.int64]] = field(default_factory=list)  # of each counted client
    header: int = 0  # bytes of an update's message without values


def initial_checkpoint(federation: Federation, state: Arrays) -> Checkpoint:
    """Round 0: the start and its evaluation, committed."""
    started = time.monotonic()
    privacy = open_privacy(federation.run, federation.budget, len(federation.roster.members), None)
    evaluation = federation.evaluate(state)
    row = privacy.row(Round(round=0, evaluation=evaluation, wall_s=time.monotonic() - started))
    checkpoint = Checkpoint(federation.digest, 0, state, row)
    federation.journal.commit(checkpoint)
    federation.observer.round_done(row)
    return checkpoint


def run_rounds(federation: Federation, checkpoint: Checkpoint) -> Checkpoint:
    """All rounds after `checkpoint`, each committed before the next begins; the last one's checkpoint.

    A private run ends early, and well, before the round that its budget does not allow.

    Raises:
        QuorumError: too few clients answered in time. What was committed stays.
        FederationError: too few updates for the strategy.
        FedPEFTError: what the clients failed with, if no quorum was left because of it.
    """
    run = federation.run
    layout = federation.space.update_layout(layout_of(checkpoint.state))
    check_touched((*federation.stages, *filter(None, (federation.downlink,))), layout)
    cohort = cohort_size(run.federation.sampling, len(federation.roster.members))
    strategy = StrategyRunner(run, layout, cohort)
    strategy.restore(checkpoint.strategy)
    privacy = open_privacy(run, federation.budget, len(federation.roster.members), checkpoint)
    if federation.memory is not None:
        federation.memory.restore_memory(checkpoint.clients)
    broadcast = _broadcast(federation, checkpoint)
    while checkpoint.round < run.run.rounds:
        after = _round(federation, strategy, privacy, broadcast, checkpoint)
        if after is None:
            break
        checkpoint = after
    return checkpoint


def _broadcast(federation: Federation, checkpoint: Checkpoint) -> Broadcast | None:
    steps = steps_of(federation.run, federation.digest, federation.space)
    if steps is None:
        return None
    broadcast = Broadcast(steps, federation.roster.names, shared=federation.memory is not None)
    broadcast.restore(checkpoint.downlink)
    return broadcast


def _round(
    federation: Federation,
    strategy: StrategyRunner,
    privacy: RoundPrivacy,
    broadcast: Broadcast | None,
    before: Checkpoint,
) -> Checkpoint | None:
    """One round: ask, collect, close, evaluate, commit; None, with nobody asked, if the budget is spent."""
    started = time.monotonic()
    number = before.round + 1
    state_digest = arrays_digest(before.state)
    payload = _state_payload(federation, before, number, state_digest)
    sending: Outgoing = WholeStates(payload)
    if broadcast is not None:
        broadcast.open(number, payload, state_digest)
        sending = broadcast
    draw = functools.partial(
        draw_cohort,
        federation.run,
        federation.roster,
        number,
        bytes_down=sending.size,
        bytes_up=_expected_bytes(before, payload),
        coins=privacy.coins(number),
    )
    cohort = federation.journal.open_round(number, draw)
    aggregator = privacy.begin(strategy, number, cohort)
    if not privacy.spend(number, cohort.asked):
        return None
    federation.observer.round_started(number, len(cohort.asked) if privacy.counts_answers else 0)
    collected = _collect(federation, aggregator, privacy, cohort, number, sending, before.state, state_digest)
    if privacy.counts_answers:
        _check_quorum(federation, cohort, collected, number)
    folded = sum(outcome.status == "folded" for outcome in collected.outcomes)
    change = aggregator.close() if folded or not privacy.counts_answers else {}
    step, refused = _step(federation, broadcast, before.state, change)
    last = number == federation.run.run.rounds or privacy.ends_after(number, federation.roster.names)
    due = number % federation.run.evaluation.every == 0 or last
    row = Round(
        round=number,
        outcomes=tuple(sorted((*collected.outcomes, *cohort.lost), key=lambda outcome: outcome.client)),
        train_loss=_weighted_mean(collected.losses),
        state_norm_change=_norm(change),
        up=leg_up(federation.stages, aggregator.layout, collected.outcomes, collected.header),
        down=leg_down(federation.downlink, layout_of(before.state), collected.outcomes, step),
        scalars=scalars_of(collected.scalars),
        evaluation=federation.evaluate(step.state) if due else None,
        virtual_s=cohort.virtual_s,
        notes=refused if folded else ("nobody was sampled; the state stays as it is",),
        wall_s=time.monotonic() - started,
    )
    clients = federation.memory.memory() if federation.memory is not None else {}
    remembered = broadcast.memory() if broadcast is not None else {}
    row, kept = privacy.row(row), privacy.memory()
    after = Checkpoint(
        federation.digest, number, step.state, row, strategy.memory(), clients, remembered, kept
    )
    federation.journal.commit(after)
    federation.observer.round_done(row)
    return after


def _step(
    federation: Federation,
    broadcast: Broadcast | None,
    state: Arrays,
    change: Mapping[str, NDArray[np.floating[Any]]],
) -> tuple[Step, tuple[str, ...]]:
    """The next state: moved by the change, or by what clients will be told of it; and notes for the row.

    A strategy's own memory, or noise, may make a change larger than what clients sent. Where it leads out of
    the space's range it is left out, and the run goes on from the state as it was.
    """

    def step(change: Mapping[str, NDArray[np.floating[Any]]]) -> Step:
        if broadcast is not None:
            return broadcast.advance(state, change)
        return Step(federation.space.apply(state, change) if change else state)

    try:
        return step(change), ()
    except UpdateError as error:
        return step({}), (f"the round's change was left out: {error}",)


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
    privacy: RoundPrivacy,
    cohort: Cohort,
    number: int,
    sending: Outgoing,
    state: Arrays,
    state_digest: str,
) -> _Collected:
    """Send the tasks and fold the replies as they arrive."""
    names = {federation.roster.members[name].node_id: name for name in cohort.working}
    contents = _contents(federation, number, {name: sending.payload(name) for name in cohort.working})
    messages = [Message(contents[names[node]], node, TRAIN, group_id=str(number)) for node in sorted(names)]
    collected = _Collected(state)
    timeout_s = federation.timeout_s
    silent = dict(names)
    for reply in exchange(federation.grid, messages, timeout_s=timeout_s):
        name = silent.pop(reply.metadata.src_node_id)
        size = sending.size(name)
        outcome = _count(federation, aggregator, reply, name, number, size, state_digest, collected)
        sending.heard(outcome)
        if federation.run.federation.clock is not None:
            outcome = outcome.model_copy(update={"virtual_s": cohort.working[name]})
        _note(federation, privacy, collected, outcome)
    for name in silent.values():
        late = ClientOutcome(client=name, status="late", reason=f"no answer in {timeout_s:g} s")
        _note(federation, privacy, collected, late)
    return collected


def _contents(federation: Federation, number: int, payloads: Mapping[str, bytes]) -> dict[str, RecordDict]:
    """Each client's task; clients that are sent the same share one object."""
    made: dict[bytes, RecordDict] = {}
    for payload in payloads.values():
        if payload not in made:
            made[payload] = task_content(
                Task(
                    run_digest=federation.digest,
                    round=number,
                    state=payload,
                    run_json=federation.run_json,
                    proximal_mu=proximal_mu(federation.run.federation.strategy),
                )
            )
    return {name: made[payload] for name, payload in payloads.items()}


def _note(
    federation: Federation, privacy: RoundPrivacy, collected: _Collected, outcome: ClientOutcome
) -> None:
    collected.outcomes.append(outcome)
    shown = privacy.shown(outcome)
    if shown is not None:
        federation.observer.client_done(shown)


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
        collected.header = collected.header or header_bytes(envelope)
        context = StageContext(federation.run.run.seed, number, name)
        metrics = {key: value for key, value in envelope.metrics.items() if math.isfinite(value)}
        came = Update(envelope.arrays, envelope.weight, metrics, envelope.encoded)
        update = on_server(federation.stages, came, context)
        federation.space.check(update.arrays, state=collected.state, who=name)
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
    sent = scalars_in(update.arrays)
    if sent is not None:
        collected.scalars.append(sent)
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
        if kind is FederationError:  # what went wrong is around the clients, and may be over the next time
            kind = QuorumError
        raise kind(f"{summary}; {first.client}: {first.reason}")
    raise QuorumError(f"{summary}; raise federation.deadline_s or over_selection, or lower federation.quorum")


def _weighted_mean(losses: list[tuple[int, float]]) -> float | None:
    total = sum(weight for weight, _ in losses)
    return math.fsum(weight * loss for weight, loss in losses) / total if total else None


def _norm(change: Mapping[str, NDArray[np.floating[Any]]]) -> float:
    return math.sqrt(math.fsum(float(np.sum(np.square(array))) for array in change.values()))
