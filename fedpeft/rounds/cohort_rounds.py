"""Synchronous rounds: a cohort is drawn, asked at once and waited for.

An over-selected cohort whose answers come in real time is waited for until the first so many sound ones are
in. Who they are depends on the agents and the network; the journal's side decides it durably, as it takes an
update in or does not (see `fedpeft_server.store.results`), so a restart counts the same ones.
"""

from __future__ import annotations

import functools

from flwr.app import Message

from fedpeft.ledger import Cohort
from fedpeft.ledger.records import ClientOutcome
from fedpeft.rounds.cohort_draw import draw_cohort
from fedpeft.rounds.collector import CollectedRound, Opening, refuse_too_few
from fedpeft.rounds.factor_rounds import FactorAggregator, get_measurement, needs_factors
from fedpeft.rounds.private_rounds import RoundPrivacy
from fedpeft.rounds.replies import RoundReplies, TaskRequest, note, process_reply, task_contents
from fedpeft.rounds.round_context import RoundContext
from fedpeft.rounds.strategies import Aggregator, StrategyRunner
from fedpeft.transport.message_exchange import MessageExchange, Spares
from fedpeft.transport.tasks import TRAIN

_NOBODY = "nobody was sampled; the state stays as it is"
_SPARE = "not needed: {} others had answered"
_AWAY = "away, and all who were connected had answered"


class CohortRounds:
    """See the module; a `UpdateCollector`."""

    def __init__(self, federation: RoundContext, strategy: StrategyRunner, privacy: RoundPrivacy) -> None:
        self._federation, self._strategy, self._privacy = federation, strategy, privacy

    def collect(self, opening: Opening) -> CollectedRound | None:
        """One cohort; a private run ends before the round that its budget does not allow."""
        federation, privacy, number = self._federation, self._privacy, opening.number
        draw = functools.partial(
            draw_cohort,
            federation.run,
            federation.roster,
            number,
            bytes_down=opening.sending.size,
            bytes_up=opening.expected_bytes,
            coins=privacy.coins(number),
        )
        cohort = federation.journal.open_round(number, draw)
        self._strategy.start_from(opening.before.state)
        aggregator: Aggregator = privacy.begin(self._strategy, number, cohort)
        if needs_factors(federation):
            aggregator = FactorAggregator(federation, aggregator, opening.before.state, number)
        if not privacy.spend(number, cohort.asked):
            return None
        federation.observer.round_started(number, len(cohort.asked) if privacy.counts_answers else 0)
        collected = self._collect(opening, aggregator, cohort)
        if privacy.counts_answers:
            self._check_quorum(cohort, collected, number)
        folded = collected.folded
        outcomes = sorted((*collected.outcomes, *cohort.lost), key=lambda outcome: outcome.client)
        change = aggregator.close() if folded or not privacy.counts_answers else {}
        return CollectedRound(
            change=change,
            layout=aggregator.layout,
            collected=collected,
            outcomes=tuple(outcomes),
            virtual_s=cohort.virtual_s,
            notes=() if folded else (_NOBODY,),
            aggregation=get_measurement(aggregator),
        )

    def admit(self, federation: RoundContext) -> None:
        """Others have joined."""
        self._federation = federation

    def close(self) -> None:
        """Nobody is at work between rounds."""

    def _collect(self, opening: Opening, aggregator: Aggregator, cohort: Cohort) -> RoundReplies:
        """Send the tasks and fold the replies as they arrive."""
        federation, sending, number = self._federation, opening.sending, opening.number
        names = {federation.roster.members[name].node_id: name for name in cohort.working}
        payloads = {name: sending.payload(name) for name in cohort.working}
        contents = task_contents(federation, number, payloads)
        messages = (
            Message(contents[names[node]], node, TRAIN, group_id=str(number)) for node in sorted(names)
        )
        collected = RoundReplies(opening.before.state)
        timeout_s = federation.timeout_s
        silent = dict(names)
        exchange = MessageExchange(
            federation.grid,
            messages,
            timeout_s=timeout_s,
            enough=lambda: collected.folded >= max(1, self._count_needed(cohort)),
        )
        for reply in exchange.replies():
            name = silent.pop(reply.metadata.src_node_id)
            layout = aggregator.layout_of(name) if isinstance(aggregator, FactorAggregator) else None
            asked = TaskRequest(name, number, opening.digest_of(name), sending.size(name), layout)
            outcome = process_reply(federation, aggregator, reply, asked, collected)
            sending.record_outcome(outcome)
            if federation.run.federation.clock is not None:
                outcome = outcome.model_copy(update={"virtual_s": cohort.working[name]})
            note(federation, self._privacy, collected, outcome)
            if cohort.places is not None:
                if collected.folded == cohort.places:
                    break
                self._free_place(number, outcome)
        if not self._privacy.counts_answers or collected.folded >= self._count_needed(cohort):
            exchange.release()  # else the round is tried again, and they go on with their work
        whole = collected.folded == cohort.places
        reason = f"no answer in {timeout_s or 0:g} s"
        if whole:
            reason = _SPARE.format(cohort.places)
        elif exchange.left_out:
            reason = _AWAY
        for name in silent.values():
            late = ClientOutcome(client=name, status="late", reason=reason)
            note(federation, self._privacy, collected, late)
        return collected

    def _free_place(self, number: int, outcome: ClientOutcome) -> None:
        """An answer that does not count takes no place from those that may."""
        grid = self._federation.grid
        if outcome.status != "folded" and isinstance(grid, Spares):
            grid.free_place(number, outcome.client)

    def _count_needed(self, cohort: Cohort) -> int:
        return cohort.quorum(self._federation.run.federation.quorum)

    def _check_quorum(self, cohort: Cohort, collected: RoundReplies, number: int) -> None:
        """Stop the run when too few of the asked clients counted."""
        needed = self._count_needed(cohort)
        if collected.folded >= needed:
            return
        counted = f"{collected.folded} of {len(cohort.asked)} clients counted"
        refuse_too_few(
            f"round {number}: {counted}, the quorum is {needed}",
            "raise federation.deadline_s or over_selection, or lower federation.quorum",
            collected,
            [*collected.outcomes, *cohort.lost],
        )
