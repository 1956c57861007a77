"""The round loop: ours, so that it can be stopped at any instant and go on from the last committed round."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.aggregation.exact_sum import norm_of, prepare_sums
from fedpeft.aggregation.lora_rules import is_residual
from fedpeft.config.sampling import cohort_size
from fedpeft.errors import UpdateError
from fedpeft.ledger import Checkpoint
from fedpeft.ledger.records import Round
from fedpeft.privacy.kinds import is_cohort_secret
from fedpeft.rounds.buffered.buffered_rounds import BufferedRounds
from fedpeft.rounds.cohort_rounds import CohortRounds
from fedpeft.rounds.collector import CollectedRound, Opening, UpdateCollector
from fedpeft.rounds.downlink.broadcast import Broadcast, Outgoing, WholeStates
from fedpeft.rounds.downlink.exact_steps import steps_of
from fedpeft.rounds.downlink.per_client_state import PerClientStates
from fedpeft.rounds.downlink.state_payload import state_payload
from fedpeft.rounds.downlink.state_steps import Step
from fedpeft.rounds.private_rounds import RoundPrivacy, open_privacy
from fedpeft.rounds.round_context import RoundContext
from fedpeft.rounds.scalar_counts import scalars_of
from fedpeft.rounds.strategies import StrategyRunner
from fedpeft.rounds.traffic_stats import download_stats, upload_stats
from fedpeft.stages import check_touched
from fedpeft.updates.packed import PackedArrays
from fedpeft.updates.update import Arrays, arrays_digest, layout_of


def initial_checkpoint(federation: RoundContext, state: Arrays) -> Checkpoint:
    """Round 0: the start and its evaluation, committed."""
    started = time.monotonic()
    privacy = open_privacy(federation.run, federation.budget, len(federation.roster.members), None)
    evaluation = federation.evaluate(state)
    row = privacy.row(Round(round=0, evaluation=evaluation, wall_s=time.monotonic() - started))
    checkpoint = Checkpoint(federation.digest, 0, state, row)
    federation.journal.commit(checkpoint)
    federation.observer.round_done(row)
    return checkpoint


def run_rounds(federation: RoundContext, checkpoint: Checkpoint) -> Checkpoint:
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
    strategy = StrategyRunner(run, federation.space.sum_layout(layout_of(checkpoint.state)), cohort)
    strategy.restore(checkpoint.strategy)
    privacy = open_privacy(run, federation.budget, len(federation.roster.members), checkpoint)
    if federation.memory is not None:
        federation.memory.restore_memory(checkpoint.clients)
    broadcast = _broadcast(federation, checkpoint)
    gathering: UpdateCollector = CohortRounds(federation, strategy, privacy)
    if run.federation.mode == "buffered":
        gathering = BufferedRounds(federation, strategy, privacy, checkpoint)
    prepare_sums()
    while checkpoint.round < run.run.rounds:
        federation = _with_newcomers(federation, gathering, broadcast, checkpoint.round + 1)
        after = _round(federation, gathering, strategy, privacy, broadcast, checkpoint)
        if after is None:
            break
        checkpoint = after
    gathering.close()
    return checkpoint


def _with_newcomers(
    federation: RoundContext, gathering: UpdateCollector, broadcast: Broadcast | None, number: int
) -> RoundContext:
    """The federation with those who have come since the last round began."""
    roster = federation.roster if federation.newcomers is None else federation.newcomers(number)
    if roster.members.keys() == federation.roster.members.keys():
        return federation
    larger = replace(federation, roster=roster)
    gathering.admit(larger)
    if broadcast is not None:
        broadcast.admit(roster.names)
    return larger


def _broadcast(federation: RoundContext, checkpoint: Checkpoint) -> Broadcast | None:
    steps = steps_of(federation.run, federation.task_digest, federation.space)
    if steps is None:
        return None
    broadcast = Broadcast(
        steps,
        federation.roster.names,
        shared=federation.memory is not None,
        secret=is_cohort_secret(federation.run),
    )
    broadcast.restore(checkpoint.downlink)
    return broadcast


def _round(
    federation: RoundContext,
    gathering: UpdateCollector,
    strategy: StrategyRunner,
    privacy: RoundPrivacy,
    broadcast: Broadcast | None,
    before: Checkpoint,
) -> Checkpoint | None:
    """One round: gather, move, evaluate, commit; None, with nobody asked, if the budget is spent."""
    started = time.monotonic()
    number = before.round + 1
    gathered = gathering.collect(_opening(federation, broadcast, before))
    if gathered is None:
        return None
    step, refused = _step(federation, broadcast, before.state, gathered.change)
    last = number == federation.run.run.rounds or privacy.ends_after(number, federation.roster.names)
    row = _row(federation, gathered, before, step).model_copy(
        update={
            "notes": (*gathered.notes, *refused),
            "evaluation": federation.evaluate(step.state)
            if last or number % federation.run.evaluation.every == 0
            else None,
            "wall_s": time.monotonic() - started,
        }
    )
    row = privacy.row(row)
    after = Checkpoint(
        federation.digest,
        number,
        step.state,
        row,
        strategy=strategy.memory(),
        clients=federation.memory.memory() if federation.memory is not None else {},
        downlink=broadcast.memory() if broadcast is not None else {},
        privacy=privacy.memory(),
        pending=gathered.pending,
    )
    federation.journal.commit(after)
    federation.observer.round_done(row)
    return after


def _opening(federation: RoundContext, broadcast: Broadcast | None, before: Checkpoint) -> Opening:
    """The round after `before`, and its state on the way to clients."""
    number, digest = before.round + 1, arrays_digest(before.state)
    payload = state_payload(federation, before.state, number, digest)
    sending: Outgoing = WholeStates(payload)
    if not (federation.shares.all_alike and federation.roster.one_base):
        sending = PerClientStates(federation, before.state, number)
    elif broadcast is not None:
        broadcast.open(number, payload, digest)
        sending = broadcast
    return Opening(number, before, payload, digest, sending)


def _row(federation: RoundContext, gathered: CollectedRound, before: Checkpoint, step: Step) -> Round:
    """The round's record, before evaluation."""
    collected = gathered.collected
    return Round(
        round=before.round + 1,
        outcomes=gathered.outcomes,
        train_loss=collected.train_loss,
        state_norm_change=_norm(gathered.change),
        up=upload_stats(federation.stages, gathered.layout, collected.outcomes, collected.header),
        down=download_stats(federation.downlink, layout_of(before.state), collected.outcomes, step),
        scalars=scalars_of(collected.scalars),
        virtual_s=gathered.virtual_s,
        staleness=gathered.staleness,
        joined=federation.roster.names_joining(before.round + 1),
        aggregation=gathered.aggregation,
    )


def _step(
    federation: RoundContext,
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


def _norm(change: Mapping[str, NDArray[np.floating[Any]]]) -> float:
    """Of what is trained; a residual is what rounding left over."""
    if isinstance(change, PackedArrays) and not any(map(is_residual, change.packing)):
        return norm_of(change.flat)
    kept = (array for name, array in change.items() if not is_residual(name))
    return math.sqrt(math.fsum(float(np.sum(np.square(array))) for array in kept))
