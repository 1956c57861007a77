"""Which tasks an agent takes: by their kind, round and run file, the owner's policy, rows and privacy."""

from __future__ import annotations

from pathlib import Path

from fedpeft.config import RunConfig
from fedpeft.errors import FederationError, UpdateError
from fedpeft.runfile import run_digest, run_from_json
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.wire.content import decode_content
from fedpeft.wire.task_kinds import TASK_KINDS, TRAIN
from fedpeft_client.accountant import Accountant
from fedpeft_client.answers import Answer
from fedpeft_client.policy import Policy, objections, refuse
from fedpeft_client.usage import RunUsage, UsageBook, run_key
from fedpeft_client.workshop import Doer


class Admission:
    """What is known of the runs that an agent was let in on, and what each of them may still be answered.

    Args:
        client: the agent's name.
        home: folder of the agent's state.
        needs_run: whether a task without a run file is refused; apps of tests and benchmarks have none.

    Raises:
        StateError: the privacy ledger is damaged or was lost.
        StorageError: it cannot be read or written.
    """

    def __init__(
        self, client: str, policy: Policy, home: Path, book: UsageBook, worker: Doer, *, needs_run: bool
    ) -> None:
        self._client, self._policy, self._book, self._needs_run = client, policy, book, needs_run
        self.accountant = Accountant(
            home / "privacy",
            policy,
            worker,
            client,
            earlier_epsilon=book.usage.promised_epsilon,
            known_lines=book.usage.ledger_lines,
        )
        self._approved: dict[str, tuple[str, RunConfig]] = {}  # by digest: run files of runs that were let in

    async def admit(self, task: pb.Task, content: bytes) -> str:
        """Return the run file of a task against which nothing speaks; empty where there is none.

        Raises:
            PolicyError: the owner's policy speaks against it.
            PrivacyError: the run's promise does, by the device's own account.
            FederationError, UpdateError: its kind, its round or its run file does.
        """
        if task.kind not in TASK_KINDS:
            known = ", ".join(sorted(TASK_KINDS))
            raise UpdateError(f"a task of the unknown kind {task.kind[:40]!r} came; known: {known}")
        digest = task.run_digest.hex()
        stated = decode_content(content, who="the server").get("task", {})
        if stated.get("run-digest") != digest:
            raise UpdateError(
                f"a task of run {digest[:12]} came with the content of another run; nothing was trained"
            )
        known_json = self._approved[digest][0] if digest in self._approved else ""
        run_json = str(stated.get("run", "")) or known_json
        if not run_json:
            if not self._needs_run:
                return ""
            raise FederationError(
                f"a task of run {digest[:12]} came without its run file; nothing was trained"
            )
        if known_json != run_json:
            await self._let_in(task, digest, run_json)
        _check_round(task, stated.get("round"), self._approved[digest][1])
        self._book.usage.runs.setdefault(
            run_key(task.run, digest), RunUsage(name=self._approved[digest][1].run.name, digest=digest)
        )
        return run_json

    async def _let_in(self, task: pb.Task, digest: str, run_json: str) -> None:
        run = run_from_json(run_json)
        if run_digest(run) != digest:
            raise UpdateError(f"the run file that came is not that of run {digest[:12]}; nothing was trained")
        refuse(objections(self._policy, run.of_client(self._client)))
        await self.accountant.admit(digest, run, run_json)
        self._approved[digest] = (run_json, run)

    def is_charged(self, task: pb.Task) -> bool:
        """Return whether a task trains a private run."""
        approved = self._approved.get(task.run_digest.hex())
        return task.kind == TRAIN and approved is not None and approved[1].privacy is not None

    def kept_answer(self, task: pb.Task) -> Answer | None:
        """Return the answer that a round of a private run has had; raises as `Accountant.kept_answer`."""
        if not self.is_charged(task):
            return None
        return self.accountant.kept_answer(task.run_digest.hex(), task.round, task.run)

    async def charge(self, task: pb.Task, run_json: str) -> None:
        """Pay for a round of a private run, and settle a run's rows, durably and before anything is trained.

        Raises:
            PolicyError, PrivacyError, StorageError: see `Accountant.charge`.
        """
        if self.is_charged(task):
            digest = task.run_digest.hex()
            run = self._approved[digest][1]
            await self.accountant.charge(digest, task.round, run, run_json, server_run=task.run)
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


def _check_round(task: pb.Task, stated: object, run: RunConfig) -> None:
    """Refuse a task whose round is none of the run's, or not the one that its content says."""
    last = run.run.rounds if task.kind == TRAIN else 0
    if not min(1, last) <= task.round <= last or stated != task.round:
        raise UpdateError(
            f"{task.kind} of round {task.round} came, whose content says {stated!r}, and the run has"
            f" {run.run.rounds} rounds; a roll call is of round 0"
        )
