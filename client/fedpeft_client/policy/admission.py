"""Which tasks an agent takes: by their kind, round and run file, the owner's policy, rows and privacy."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from fedpeft.config.device_task import read_device_task
from fedpeft.config.run_identity import identity_digest
from fedpeft.config.sections import RunConfig
from fedpeft.errors import FederationError, UpdateError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.wire.task_content import read_task_content
from fedpeft.wire.task_kinds import TASK_KINDS, TRAIN
from fedpeft_client.policy.answers import Answer
from fedpeft_client.policy.device_accountant import Accountant
from fedpeft_client.policy.owner_policy import Policy, model_objections, objections, refuse
from fedpeft_client.policy.usage import RunUsage, UsageBook, run_key
from fedpeft_client.workers.worker_process import Worker

_HELD = 64  # runs that were let in; a server tells of others anew


class Admission:
    """What is known of the runs that an agent was let in on, and what each of them may still be answered.

    Args:
        client: the agent's name.
        home: folder of the agent's state.
        needs_run: whether a task that tells of no run is refused; apps of tests and benchmarks have none.
        has_model: whether the owner said where the base model lies.

    Raises:
        StateError: the privacy ledger is damaged or was lost.
        StorageError: it cannot be read or written.
    """

    def __init__(
        self,
        client: str,
        policy: Policy,
        home: Path,
        book: UsageBook,
        worker: Worker,
        *,
        needs_run: bool,
        has_model: bool,
    ) -> None:
        self._client, self._policy, self._book = client, policy, book
        self._needs_run, self._has_model = needs_run, has_model
        self.accountant = Accountant(
            home / "privacy",
            policy,
            worker,
            client,
            earlier_epsilon=book.usage.promised_epsilon,
            known_lines=book.usage.ledger_lines,
        )
        self._approved: OrderedDict[str, RunConfig] = OrderedDict()  # by digest: runs that were let in

    async def admit(self, task: pb.Task, content: bytes) -> str:
        """Return what a task that nothing speaks against tells of its run; empty where there is no run.

        The task's digest is over that text, the content is of the same run and round, and the worker loads
        that very text: what is checked here is what is used.

        Raises:
            PolicyError: the owner's policy speaks against it.
            PrivacyError: the run's promise does, by the device's own account.
            RunFileError, FederationError, UpdateError: its kind, its round or what it tells does.
        """
        if task.kind not in TASK_KINDS:
            known = ", ".join(sorted(TASK_KINDS))
            raise UpdateError(f"a task of the unknown kind {task.kind[:40]!r} came; known: {known}")
        digest, asked = task.run_digest.hex(), read_task_content(content)
        if asked.run_digest != digest:
            raise UpdateError(
                f"a task of run {digest[:12]} came with the content of another run; nothing was trained"
            )
        if not asked.device_task:
            if not self._needs_run:
                return ""
            raise FederationError(f"a task of run {digest[:12]} tells nothing of it; nothing was trained")
        if digest not in self._approved or identity_digest(asked.device_task) != digest:
            await self._let_in(digest, asked.device_task)
        self._approved.move_to_end(digest)
        _check_round(task, asked.round, self._approved[digest])
        self._book.add_run(run_key(task.run, digest), self._approved[digest].run.name, digest)
        return asked.device_task

    async def _let_in(self, digest: str, text: str) -> None:
        described = read_device_task(text)
        if described.digest != digest:
            raise UpdateError(f"what came is not what run {digest[:12]} is; nothing was trained")
        run = described.as_run
        refuse(
            [
                *objections(self._policy, run.of_client(self._client)),
                *([] if self._has_model else model_objections(self._policy, described.model.name)),
            ]
        )
        await self.accountant.admit(digest, run, text)
        self._approved[digest] = run
        while len(self._approved) > _HELD:
            self._approved.popitem(last=False)

    def is_charged(self, task: pb.Task) -> bool:
        """Return whether a task trains a private run."""
        approved = self._approved.get(task.run_digest.hex())
        return task.kind == TRAIN and approved is not None and approved.privacy is not None

    def get_answer(self, task: pb.Task) -> Answer | None:
        """Return the answer that a round of a private run has had; raises as `Accountant.get_answer`."""
        if not self.is_charged(task):
            return None
        return self.accountant.get_answer(task.run_digest.hex(), task.round, task.run)

    async def charge(self, task: pb.Task, described: str) -> None:
        """Pay for a round of a private run, and settle a run's rows, durably and before anything is trained.

        Raises:
            PolicyError, PrivacyError, StorageError: see `Accountant.charge`.
        """
        if self.is_charged(task):
            digest = task.run_digest.hex()
            run = self._approved[digest]
            await self.accountant.charge(digest, task.round, run, described, server_run=task.run)
            self._book.usage.ledger_lines = self.accountant.ledger.lines
            self._book.save()
        usage = self.usage_of(task)
        if usage is not None and task.kind == TRAIN and not usage.trained:
            usage.trained = True
            self._book.save()

    def keep_answer(self, task: pb.Task, body: bytes, memory: bytes) -> None:
        """Make the answer of a private run's round durable; call it before the answer is sent."""
        if self.is_charged(task):
            self.accountant.keep_answer(task.run_digest.hex(), Answer(task.round, body, memory))

    def note_failure(self, task: pb.Task) -> None:
        """Note that the server is told of a failure in a round of a private run."""
        if self.is_charged(task):
            self.accountant.note_failure(task.run_digest.hex(), task.round)

    def rows_of(self, task: pb.Task) -> str:
        """Return the fingerprint of the rows that a run is held to; empty until its first round."""
        usage = self.usage_of(task)
        return usage.rows if usage is not None and usage.trained else ""

    def keep_rows(self, task: pb.Task, rows: str) -> None:
        """Keep, durably, the fingerprint of the rows that a task was done with."""
        usage = self.usage_of(task)
        if usage is not None and rows and usage.rows != rows:
            usage.rows = rows
            self._book.save()

    def usage_of(self, task: pb.Task) -> RunUsage | None:
        """Return what is counted of a task's run; None if the run was not let in."""
        return self._book.usage.runs.get(run_key(task.run, task.run_digest.hex()))


def _check_round(task: pb.Task, stated: int, run: RunConfig) -> None:
    """Refuse a task whose round is none of the run's, or not the one that its content says."""
    last = run.run.rounds if task.kind == TRAIN else 0
    if not min(1, last) <= task.round <= last or stated != task.round:
        raise UpdateError(
            f"{task.kind} of round {task.round} came, whose content says {stated!r}, and the run has"
            f" {run.run.rounds} rounds; a roll call is of round 0"
        )
