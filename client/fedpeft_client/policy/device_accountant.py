"""The agent's own account of private runs: what it answers and at what cost, whatever a server says.

The rule, in numbered steps, for round r of the run with digest D:

1. A round that has its answer is answered by the same bytes again, or refused where they are no longer kept.
2. A round before the last one that was paid for is refused.
3. The costs of the round are computed by the worker, from the run file and this ledger, at the owner's own
   delta. Over the run's promise or an owner's cap, the round is refused.
4. The charge is made durable. Only then anything is trained. A round that is paid for and has no answer,
   since the agent was killed or the task withdrawn, trains again at no further cost: nothing of it has left
   the device.
5. The answer is made durable, then noted in the ledger, and only then sent.

So a round is paid for once and released once, at whatever point the process is killed.
"""

from __future__ import annotations

import math
from pathlib import Path

from fedpeft.config.sections import RunConfig
from fedpeft.errors import PrivacyError
from fedpeft.runtime.files import storage
from fedpeft.wire.failures import from_record
from fedpeft_client.policy.answers import Answer, AnswerShelf
from fedpeft_client.policy.owner_policy import Objection, Policy, refuse
from fedpeft_client.policy.privacy_ledger import Costs, PrivacyLedger
from fedpeft_client.workers.round_cost import order_costs
from fedpeft_client.workers.worker_process import Worker

MAX_FAILURES = 3  # of one round; each tells a server something that no noise covers
LEDGER_FILE = "ledger.jsonl"


class Accountant:
    """The privacy of one device's rows, over all runs.

    Args:
        folder: of ledger and answers.
        earlier_epsilon: what was booked before there was a ledger.
        known_lines: see `PrivacyLedger.at_least`.

    Raises:
        StateError: the ledger is damaged or was lost.
        StorageError: it cannot be read or written.
    """

    def __init__(
        self,
        folder: Path,
        policy: Policy,
        worker: Worker,
        client: str,
        *,
        earlier_epsilon: float,
        known_lines: int,
    ) -> None:
        with storage(folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.ledger = PrivacyLedger(folder / LEDGER_FILE, known_lines)
        self._answers = AnswerShelf(folder / "answers")
        self._policy, self._worker, self._client = policy, worker, client
        self._earlier = earlier_epsilon

    @property
    def delta(self) -> float:
        """The owner's."""
        return self._policy.delta

    @property
    def total_epsilon(self) -> float:
        """Of all runs at the owner's delta, those before there was a ledger by what they promised."""
        return self._earlier + self.ledger.total_epsilon

    async def admit(self, digest: str, run: RunConfig, described: str) -> None:
        """Refuse a private run whose next round could not be paid for; nothing is charged.

        Raises:
            PolicyError, PrivacyError: with the reason.
        """
        if run.privacy is not None:
            self._check(await self._costs(digest, described), run)

    def get_answer(self, digest: str, round_: int, run: str) -> Answer | None:
        """Return the round's one answer; None if there is none yet.

        Args:
            run: the server's name for the run.

        Raises:
            PrivacyError: the round has had its answer, which is not kept; or it comes too late, or too often.
            StateError, StorageError: the answer cannot be read.
        """
        account = self.ledger.runs.get(digest)
        if account is None:
            return None
        if account.run != run:
            raise PrivacyError(
                f"this very run file was answered before, as run {account.run}, up to round"
                f" {account.round}; a"
                " private run is answered once: give it another name or seed, which is charged anew"
            )
        answer = self._answers.get(digest)
        if answer is not None and answer.round == round_:
            if account.answered < round_:  # the agent was killed between the two
                self.ledger.answer(digest, round_)
            return answer
        if round_ < account.round or account.answered >= round_:
            raise PrivacyError(
                f"round {round_} of this private run was answered, and round {account.round} is paid for; a"
                " round is answered once"
            )
        if round_ == account.round and account.failures >= MAX_FAILURES:
            raise PrivacyError(f"round {round_} of this private run failed here {account.failures} times")
        return None

    async def charge(
        self, digest: str, round_: int, run: RunConfig, described: str, *, server_run: str
    ) -> None:
        """Pay for a round, unless that is done; call it before training.

        Raises:
            PolicyError, PrivacyError: it costs more than the owner allows, or than the run promises.
            StorageError: it cannot be written, so nothing may be trained.
        """
        account = self.ledger.runs.get(digest)
        if account is not None and account.round == round_:
            return
        costs = await self._costs(digest, described, round_)
        self._check(costs, run)
        self.ledger.charge(digest, round_, costs, run=server_run, name=run.run.name)

    def keep_answer(self, digest: str, answer: Answer) -> None:
        """Make a round's one answer durable; call it before the answer is sent."""
        self._answers.put(digest, answer)
        self.ledger.answer(digest, answer.round)

    def note_failure(self, digest: str, round_: int) -> None:
        """Note that the server is told of a failure in a round that is paid for."""
        account = self.ledger.runs.get(digest)
        if account is None or account.failures >= MAX_FAILURES:
            return
        if account.round == round_ > account.answered:
            self.ledger.fail(digest, round_)

    async def _costs(self, digest: str, described: str, round_: int = 0) -> Costs:
        account = self.ledger.runs.get(digest)
        others = [(event, count) for other, event, count in self.ledger.events() if other != digest]
        charged = 0 if account is None else account.count
        order = order_costs(described, self._client, charged, others, self._policy.delta, round_=round_)
        header = (await self._worker.do(order)).header
        if header["error"]:
            raise from_record(header["error"])
        return Costs(
            header["event"],
            int(header["count"]),
            float(header["epsilon"]),
            float(header["promised_epsilon"]),
            float(header["total_epsilon"]),
        )

    def _check(self, costs: Costs, run: RunConfig) -> None:
        """Compare costs with the run's promise and with the owner's caps."""
        policy = self._policy
        promised = math.inf if run.privacy is None else run.privacy.max_epsilon
        total = self._earlier + costs.total_epsilon
        if not all(map(math.isfinite, (costs.epsilon, costs.promised_epsilon, total))):
            raise PrivacyError(
                f"by this device's own account a round costs an infinite epsilon at delta {policy.delta:g};"
                " that hides nothing"
            )
        if costs.promised_epsilon > promised:
            raise PrivacyError(
                f"by this device's own account the round brings epsilon to {costs.promised_epsilon:.4g}, and"
                f" the run's own max_epsilon is {promised:g}"
            )
        refuse(
            [
                self._over("max_run_epsilon", costs.epsilon, policy.run_epsilon_cap),
                self._over("max_total_epsilon", total, policy.max_total_epsilon or math.inf),
            ]
        )

    def _over(self, key: str, cost: float, most: float) -> Objection | None:
        if cost <= most:
            return None
        text = (
            f"by this device's own account the round brings epsilon to {cost:.4g} at delta {self.delta:g},"
            f" and policy.{key} is {most:g}"
        )
        return Objection(key, text, most)
