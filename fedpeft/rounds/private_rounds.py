"""What privacy changes in a round: the cohort's coins, the sum's noise, the ledger, and what may be told.

The order within a round is: draw the cohort; dry-run the round in the accountant; commit its charge to the
ledger, flushed to the disk; only then ask anyone. So whatever a killed process may have released is paid for.
A process that comes back does not know whether its predecessor's noise was seen, and draws anew: it charges
the round once more. (Seeded noise is the same noise again, which tells nothing new and costs nothing more.)

An update that does not come, or that is refused, is a zero in the sum: that is a neighbour's sum, which the
noise is made for. Nothing else happens on its account, neither a smaller divisor nor an end of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.config.sections import ClientLevelPrivacy, RunConfig
from fedpeft.errors import PrivacyError, StateError
from fedpeft.ledger import Checkpoint, Cohort
from fedpeft.ledger.records import ClientOutcome, Round
from fedpeft.privacy.budget import BudgetLedger, Charge
from fedpeft.privacy.central import CentralMechanism, PrivateSum, sample_rate_of
from fedpeft.privacy.clipping import AdaptiveClipping
from fedpeft.privacy.kinds import KINDS, accounts, budget_of, event_of
from fedpeft.privacy.noise import NoiseSource
from fedpeft.privacy.noise_sources import noise_source
from fedpeft.privacy.run_checks import delta_problem
from fedpeft.rounds.strategies import Aggregator, StrategyRunner
from fedpeft.updates.packed import pack, packing_of
from fedpeft.updates.update import Arrays, Layout, Update, layout_of

CLIP_NORM = "clip_norm"  # in the checkpoint: the adaptive bound of the coming round
CLIP_LEARNING_RATE = 0.2  # Andrew et al. 2021, section 3.1
_PRIVATE_COLUMNS = {"loss": None, "examples": 0}
COUNT_SHARE = 1 / 20  # of the expected cohort: the noise on the count of bits, as there


class BudgetStore(Protocol):
    """Where the ledger of spent privacy lies."""

    @property
    def resumes(self) -> bool:
        """Whether a round that was cut short is gone on with, its cohort and updates kept, instead of anew.

        Then nothing of it was released before its commit, and its charge pays for it however often it is
        interrupted.
        """
        ...

    def read_spent_ledger(self) -> str | None:
        """What was committed last; None before the first charge."""
        ...

    def commit_spent(self, ledger: str) -> None:
        """Make the ledger durable before this returns."""
        ...


class RoundPrivacy(Protocol):
    """What a round asks its privacy; `NoPrivacy` answers for runs without."""

    @property
    def counts_answers(self) -> bool:
        """Whether the round may depend on how many answered: on a quorum, and on nobody having come."""
        ...

    def coins(self, number: int) -> NoiseSource | None:
        """Where the cohort's secret coins come from; None: the cohort is public."""
        ...

    def spend(self, number: int, asked: Sequence[str]) -> bool:
        """Charge the round, durably; False, with nothing charged, if the budget does not allow it."""
        ...

    def begin(self, strategy: StrategyRunner, number: int, cohort: Cohort) -> Aggregator:
        """What the round's updates are folded into."""
        ...

    def filter_outcome(self, outcome: ClientOutcome) -> ClientOutcome | None:
        """What the operator's display may show of it; None: nothing."""
        ...

    def ends_after(self, number: int, names: Sequence[str]) -> bool:
        """Whether the budget leaves no further round, were all these asked in it; that state is measured."""
        ...

    def row(self, row: Round) -> Round:
        """What may be published of the round."""
        ...

    def memory(self) -> Mapping[str, NDArray[Any]]:
        """What the next round needs, for the checkpoint."""
        ...


class NoPrivacy:
    """Nothing is charged, nothing is hidden."""

    counts_answers = True

    def coins(self, number: int) -> NoiseSource | None:
        """The cohort is drawn from the run's seed."""
        return None

    def spend(self, number: int, asked: Sequence[str]) -> bool:
        """There is no budget."""
        return True

    def begin(self, strategy: StrategyRunner, number: int, cohort: Cohort) -> Aggregator:
        """The strategy's own."""
        return strategy.begin(number, capacity=max(1, len(cohort.working)))

    def filter_outcome(self, outcome: ClientOutcome) -> ClientOutcome | None:
        """All of it."""
        return outcome

    def ends_after(self, number: int, names: Sequence[str]) -> bool:
        """There is no budget."""
        return False

    def row(self, row: Round) -> Round:
        """All of it."""
        return row

    def memory(self) -> Mapping[str, NDArray[Any]]:
        """Nothing."""
        return {}


class _Accounts:
    """The ledger of a run: dry run first, then the charge, then the disk."""

    def __init__(self, run: RunConfig, store: BudgetStore, ledger: BudgetLedger) -> None:
        self._run = run
        self._store = store
        self._ledger = ledger
        self._budget = budget_of(run)
        self._event = event_of(run)
        self._redraws = run.privacy is not None and not run.privacy.seeded and not store.resumes

    @property
    def epsilon(self) -> float:
        """Spent so far, by the account that spent most."""
        return self._ledger.epsilon(self._budget.target_delta)

    @property
    def epsilon_of_cohort(self) -> float:
        """Spent so far against whoever sees the cohorts."""
        return self._ledger.epsilon_of_cohort(self._budget.target_delta)

    def spend(self, number: int, asked: Sequence[str]) -> bool:
        """See `RoundPrivacy.spend`."""
        after = self._after(number, asked)
        if not self._allows(after):
            return False
        self._store.commit_spent(after.to_json())
        self._ledger = after
        return True

    def ends_after(self, number: int, names: Sequence[str]) -> bool:
        """See `RoundPrivacy.ends_after`."""
        return not self._allows(self._after(number + 1, names))

    def _after(self, number: int, asked: Sequence[str]) -> BudgetLedger:
        holders = accounts(self._run, asked)
        if self._redraws and number <= self._ledger.last_round:
            return self._ledger.recharge(number, holders, self._event)
        return self._ledger.charge([Charge(number, holder, (self._event,)) for holder in holders])

    def _allows(self, after: BudgetLedger) -> bool:
        spending = self._ledger.dry_run(after, self._budget.target_delta)
        return spending.after <= self._budget.max_epsilon


class CohortPrivacy:
    """Client-level privacy: secret cohorts, one noised sum per round, and silence about who came.

    Counts, names, bytes, losses, norms and the length of a round all tell about the cohort, so the row keeps
    only what is computed from the released state. Failures and refusals are shown to the operator, who is
    trusted, and written nowhere.

    Args:
        clients: how many could be asked.
        clip_norm: the adaptive bound where an earlier round left one.
    """

    counts_answers = False

    def __init__(
        self, run: RunConfig, books: _Accounts, clients: int, clip_norm: float | None, rounds_done: int
    ) -> None:
        section = run.privacy
        if not isinstance(section, ClientLevelPrivacy):
            raise PrivacyError("client-level privacy came without its section in the run file")
        self._run, self._books = run, books
        self._mechanism = CentralMechanism(
            clip_norm=section.clip_norm,
            noise_multiplier=section.noise_multiplier,
            sample_rate=sample_rate_of(run.federation, max_weight=section.max_weight),
            clients=clients,
            max_weight=section.max_weight or 1,
        )
        self._clipping = adaptive_clipping(section, self._mechanism.expected_cohort)
        if self._clipping is not None and rounds_done:
            if clip_norm is None:
                raise StateError(
                    "the checkpoint holds no adaptive clipping bound; resume with the run file that it"
                    " belongs to"
                )
            self._clipping = replace(self._clipping, clip_norm=clip_norm)

    def coins(self, number: int) -> NoiseSource | None:
        """Secret ones."""
        return noise_source(self._run, "cohort", number)

    def spend(self, number: int, asked: Sequence[str]) -> bool:
        """One account for all clients, whoever is asked."""
        return self._books.spend(number, asked)

    def begin(self, strategy: StrategyRunner, number: int, cohort: Cohort) -> Aggregator:
        """A sum that clips, and noises when it is closed."""
        total = PrivateSum(
            self._mechanism,
            strategy.layout,
            cohort.asked,
            quantum_exponent=self._run.federation.quantum_exponent,
            clipping=self._clipping,
        )
        return _NoisedSum(self, strategy, number, total)

    def release(self, number: int, total: PrivateSum) -> dict[str, NDArray[np.float64]]:
        """The round's noised mean; the bound of the next round is left behind."""
        released = total.release(noise_source(self._run, "release", number))
        self._clipping = released.clipping
        return released.mean

    def ends_after(self, number: int, names: Sequence[str]) -> bool:
        """Exact: every round costs the one account the same."""
        return self._books.ends_after(number, names)

    def filter_outcome(self, outcome: ClientOutcome) -> ClientOutcome | None:
        """Trouble and its reason."""
        if outcome.status not in ("failed", "refused"):
            return None
        return ClientOutcome(client=outcome.client, status=outcome.status, reason=outcome.reason)

    def row(self, row: Round) -> Round:
        """The state's own numbers, and epsilon."""
        return Round(
            round=row.round,
            state_norm_change=row.state_norm_change,
            evaluation=row.evaluation,
            epsilon=self._books.epsilon,
            epsilon_cohort=self._books.epsilon_of_cohort,
        )

    def memory(self) -> Mapping[str, NDArray[Any]]:
        """The adaptive bound."""
        return {} if self._clipping is None else {CLIP_NORM: np.array([self._clipping.clip_norm])}


class _NoisedSum:
    """One round's sum under client-level privacy, as the round loop and the strategy see it."""

    def __init__(
        self, privacy: CohortPrivacy, strategy: StrategyRunner, number: int, total: PrivateSum
    ) -> None:
        self._privacy, self._strategy, self._number, self._total = privacy, strategy, number, total
        self.layout: Layout = strategy.layout

    def fold(self, client: str, update: Update) -> float:
        """Clip and count one update; its norm stays here."""
        self._total.fold(client, update)
        return 0.0

    def close(self) -> Arrays:
        """Release, then let the strategy work on what was released."""
        mean = self._privacy.release(self._number, self._total)
        packed = pack(mean, packing_of(layout_of(mean)))  # rules of other types are refused under this kind
        return self._strategy.aggregate_mean(self._number, packed, 1)


class ClientPrivacy:
    """Record-level and local privacy: clients add the noise, the server keeps their accounts.

    Who was asked and who came is public under both relations, and so is everything computed from a noised
    update. Losses and row counts are not.
    """

    counts_answers = True

    def __init__(self, books: _Accounts) -> None:
        self._books = books

    def coins(self, number: int) -> NoiseSource | None:
        """Nothing is amplified by the cohort, which is public."""
        return None

    def spend(self, number: int, asked: Sequence[str]) -> bool:
        """Everybody who is asked pays, also who vanishes: its update may be on its way."""
        return self._books.spend(number, asked)

    def begin(self, strategy: StrategyRunner, number: int, cohort: Cohort) -> Aggregator:
        """The strategy's own: what it works on is noised already."""
        return strategy.begin(number, capacity=max(1, len(cohort.working)))

    def filter_outcome(self, outcome: ClientOutcome) -> ClientOutcome | None:
        """Without loss and rows."""
        return outcome.model_copy(update=_PRIVATE_COLUMNS)

    def ends_after(self, number: int, names: Sequence[str]) -> bool:
        """As soon as one client could not be asked again."""
        return self._books.ends_after(number, names)

    def row(self, row: Round) -> Round:
        """Without losses and rows, with epsilon."""
        outcomes = tuple(item.model_copy(update=_PRIVATE_COLUMNS) for item in row.outcomes)
        update = {"outcomes": outcomes, "train_loss": None, "epsilon": self._books.epsilon}
        return row.model_copy(update=update)

    def memory(self) -> Mapping[str, NDArray[Any]]:
        """Nothing."""
        return {}


def open_privacy(
    run: RunConfig, store: BudgetStore | None, clients: int, checkpoint: Checkpoint | None
) -> RoundPrivacy:
    """The run's privacy, going on from what was committed.

    Args:
        clients: how many could be asked.
        checkpoint: the last committed round; None before the first.

    Raises:
        PrivacyError: a private run without a place for its ledger, or a promise that cannot be kept.
        StateError: the ledger is missing, damaged, or knows less than the checkpoint.
    """
    if run.privacy is None:
        return NoPrivacy()
    if store is None:
        raise PrivacyError("the run is private and there is no place for its ledger; hold it in a run folder")
    problem = delta_problem(run, clients)
    if problem is not None:
        raise PrivacyError(problem)
    books = _Accounts(run, store, _ledger(run, store, checkpoint))
    if not KINDS[run.privacy.kind].joint:
        return ClientPrivacy(books)
    done = 0 if checkpoint is None else checkpoint.round
    kept = None if checkpoint is None else checkpoint.privacy.get(CLIP_NORM)
    return CohortPrivacy(run, books, clients, None if kept is None else float(kept[0]), done)


def adaptive_clipping(section: ClientLevelPrivacy, expected_cohort: float) -> AdaptiveClipping | None:
    """Adaptive clipping as the run file asks for it, before round 1; None: the bound is fixed."""
    if section.target_quantile is None:
        return None
    # At least z: the count then takes at most a quarter of what a round costs.
    default = max(COUNT_SHARE * expected_cohort, section.noise_multiplier)
    return AdaptiveClipping(
        clip_norm=section.clip_norm,
        count_std=section.count_std or default,
        quantile=section.target_quantile,
        learning_rate=section.clip_learning_rate or CLIP_LEARNING_RATE,
    )


def _ledger(run: RunConfig, store: BudgetStore, checkpoint: Checkpoint | None) -> BudgetLedger:
    """What was spent, checked against the last committed round."""
    text, done = store.read_spent_ledger(), 0 if checkpoint is None else checkpoint.round
    if text is None and done:
        raise StateError(
            f"{done} rounds are committed and the ledger of spent privacy is gone; restore it, the run"
            " cannot go on without it"
        )
    ledger = BudgetLedger() if text is None else BudgetLedger.from_json(text)
    claimed = 0.0 if checkpoint is None or checkpoint.row.epsilon is None else checkpoint.row.epsilon
    if ledger.epsilon(budget_of(run).target_delta) < claimed * (1.0 - 1e-9):
        raise StateError(
            f"the ledger of spent privacy knows less than round {done} had spent (epsilon {claimed:.4g});"
            " restore the newest one"
        )
    return ledger
