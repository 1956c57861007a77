"""The device's own account of private runs: durable first, one answer a round, an owner's delta."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from fedpeft.config.device_task import device_task
from fedpeft.config.run_file import build_run, run_digest
from fedpeft.config.sections import RunConfig
from fedpeft.errors import PolicyError, PrivacyError, StateError, StorageError
from fedpeft.privacy.accountant import epsilon
from fedpeft.privacy.events import ClientLevel, Event, Local, RecordLevel
from fedpeft_client.policy.answers import Answer, AnswerShelf
from fedpeft_client.policy.device_accountant import LEDGER_FILE, MAX_FAILURES, Accountant
from fedpeft_client.policy.owner_policy import DELTA, Policy
from fedpeft_client.policy.privacy_ledger import Costs, PrivacyLedger
from fedpeft_client.workers.in_process_worker import InlineWorkshop
from tests.server.test_kill_anywhere import POINTS

Result = TypeVar("Result")
LOCAL = {"kind": "local", "noise_multiplier": 8.0, "target_delta": 1e-4, "max_epsilon": 9.0, "clip_norm": 1.0}
CLIENT = {**LOCAL, "kind": "client-level", "noise_multiplier": 2.0}
COSTS = Costs({"kind": "local", "noise_multiplier": 8.0}, 1, 0.5, 0.5, 0.5)


def private(
    name: str = "study", rounds: int = 4, privacy: dict[str, Any] = LOCAL, **tables: Any
) -> RunConfig:
    run = {"name": name, "rounds": rounds}
    federation = {"weighting": "uniform"}
    return build_run({"run": run, "privacy": privacy, "federation": federation, **tables}, source="test")


def accountant(folder: Path, policy: Policy | None = None, **known: Any) -> Accountant:
    known = {"earlier_epsilon": 0.0, "known_lines": 0} | known
    return Accountant(folder, policy or Policy(), InlineWorkshop(), "site-a", **known)


def charge(book: Accountant, run: RunConfig, round_: int, server_run: str = "study-1") -> None:
    lived(book.charge(run_digest(run), round_, run, device_task(run).text, server_run=server_run))


def lived(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(work)


def cost(events: list[Event], delta: float = DELTA) -> float:
    return epsilon(events, delta)


def test_rounds_are_composed_at_the_owners_delta_and_runs_with_each_other(tmp_path: Path) -> None:
    book, run, other = accountant(tmp_path), private(), private("other")
    event = Local(noise_multiplier=8.0)
    for round_ in (1, 2):
        charge(book, run, round_)
    assert book.ledger.runs[run_digest(run)].epsilon == pytest.approx(cost([event] * 2))
    charge(book, other, 1, "other-1")
    assert book.total_epsilon == pytest.approx(cost([event] * 3)), "one accountant over all runs"
    again = accountant(tmp_path)
    assert again.ledger == book.ledger
    assert again.ledger.lines == 3
    charge(again, other, 1, "other-1")
    assert again.ledger.lines == 3, "a round is paid for once"


def test_six_run_files_under_one_name_are_six_runs(tmp_path: Path) -> None:
    book = accountant(tmp_path)
    for seed in range(6):
        charge(book, private(run={"name": "study", "rounds": 4, "seed": seed}), 1)
    assert len(book.ledger.runs) == 6
    assert book.total_epsilon == pytest.approx(cost([Local(noise_multiplier=8.0)] * 6))


def test_kinds_share_the_delta_as_their_epsilons_add_up(tmp_path: Path) -> None:
    book = accountant(tmp_path, Policy(max_delta=1e-4))
    record = {
        "kind": "record-level",
        "noise_multiplier": 1.0,
        "target_delta": 1e-5,
        "max_epsilon": 20.0,
        "max_grad_norm": 1.0,
        "sample_rate": 0.1,
        "expected_batch_size": 2.0,
    }
    charge(book, private(), 1)
    charge(book, private("rows", privacy=record, training={"steps": 3}), 1, "rows-1")
    rows = RecordLevel(noise_multiplier=1.0, sample_rate=0.1, steps=3)
    wanted = cost([Local(noise_multiplier=8.0)], 5e-5) + cost([rows], 5e-5)
    assert book.total_epsilon == pytest.approx(wanted)


def test_a_run_of_secret_cohorts_costs_all_its_rounds_at_once(tmp_path: Path) -> None:
    """Whoever was not drawn in a round was as well hidden by its coin, and pays for that round too."""
    run = private(
        privacy=CLIENT, federation={"weighting": "uniform", "sampling": {"kind": "poisson", "rate": 0.5}}
    )
    book = accountant(tmp_path)
    for round_ in (2, 3):
        charge(book, run, round_)
    event = ClientLevel(noise_multiplier=2.0, sample_rate=0.5)
    assert book.ledger.runs[run_digest(run)].count == 4
    assert book.total_epsilon == pytest.approx(cost([event] * 4))


def test_a_run_of_secret_cohorts_ends_with_its_budget_and_not_with_its_rounds(tmp_path: Path) -> None:
    """A server that goes on as if its budget were none asks for rounds that nobody has paid for."""
    run = private(
        rounds=50,
        privacy={**CLIENT, "max_epsilon": 3.0},
        federation={"weighting": "uniform", "sampling": {"kind": "poisson", "rate": 0.5}},
    )
    book = accountant(tmp_path)
    charge(book, run, 1)
    paid = book.ledger.runs[run_digest(run)].count
    assert 1 < paid < 50
    charge(book, run, paid)
    with pytest.raises(PrivacyError, match="the run's own max_epsilon is 3"):
        charge(book, run, paid + 1)
    assert book.ledger.runs[run_digest(run)].round == paid


TOO_MUCH: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "the owner's cap on a run": ({"max_run_epsilon": 3.0}, {}, "policy.max_run_epsilon is 3"),
    "the owner's cap on all": ({"max_total_epsilon": 0.1}, {}, "policy.max_total_epsilon is 0.1"),
    "a large delta and no noise": (
        {"privacy": ("local",)},
        {"noise_multiplier": 1e-9, "target_delta": 9e-3, "max_epsilon": 1e30},
        "policy.max_run_epsilon is 100",
    ),
    "no noise, and any epsilon": (
        {"privacy": ("local",)},
        {"noise_multiplier": 1e-2, "max_epsilon": 1e30},
        "policy.max_run_epsilon is 100",
    ),
    "a round beyond its own budget": ({}, {"max_epsilon": 0.01}, "one round costs"),
}


@pytest.mark.parametrize("case", sorted(TOO_MUCH))
def test_what_costs_too_much_is_refused_before_anything_is_charged(case: str, tmp_path: Path) -> None:
    allowed, changed, words = TOO_MUCH[case]
    run = private(privacy={**LOCAL, "noise_multiplier": 2.0} | changed)
    book = accountant(tmp_path, Policy.model_validate(allowed))
    with pytest.raises((PolicyError, PrivacyError)) as refused:
        lived(book.admit(run_digest(run), run, device_task(run).text))
    assert words in str(refused.value)
    with pytest.raises((PolicyError, PrivacyError)):
        charge(book, run, 1)
    assert not (tmp_path / LEDGER_FILE).exists()


def test_a_run_ends_here_when_its_promise_is_used_up_whatever_its_server_says(tmp_path: Path) -> None:
    run = private(rounds=50, privacy=LOCAL | {"max_epsilon": 4.0})
    book, event = accountant(tmp_path), Local(noise_multiplier=8.0)
    paid = next(n for n in range(1, 50) if epsilon([event] * (n + 1), 1e-4) > 4.0)
    for round_ in range(1, paid + 1):
        charge(book, run, round_)
    with pytest.raises(PrivacyError, match=r"the run's own max_epsilon is 4"):
        charge(book, run, paid + 1)
    assert book.ledger.runs[run_digest(run)].round == paid


def test_a_round_is_answered_once(tmp_path: Path) -> None:
    run, book = private(), accountant(tmp_path)
    digest = run_digest(run)
    charge(book, run, 2)
    assert book.get_answer(digest, 2, "study-1") is None, "paid for, and nothing has left"
    answer = Answer(2, b"body", b"memory")
    book.keep_answer(digest, answer)
    for again in (book, accountant(tmp_path)):
        assert again.get_answer(digest, 2, "study-1") == answer
        with pytest.raises(PrivacyError, match="round 2 is paid for"):
            again.get_answer(digest, 1, "study-1")
        with pytest.raises(PrivacyError, match="answered before, as run study-1"):
            again.get_answer(digest, 2, "study-2")
        assert again.get_answer(digest, 3, "study-1") is None
    (tmp_path / "answers" / f"{digest}.answer").unlink()
    with pytest.raises(PrivacyError, match="a round is answered once"):
        accountant(tmp_path).get_answer(digest, 2, "study-1")


def test_a_round_that_fails_again_and_again_is_refused(tmp_path: Path) -> None:
    run, book = private(), accountant(tmp_path)
    digest = run_digest(run)
    charge(book, run, 1)
    for _ in range(MAX_FAILURES):
        assert book.get_answer(digest, 1, "study-1") is None
        book.note_failure(digest, 1)
    with pytest.raises(PrivacyError, match="failed here 3 times"):
        accountant(tmp_path).get_answer(digest, 1, "study-1")
    charge(book, run, 2)
    assert book.get_answer(digest, 2, "study-1") is None


def test_a_line_that_was_cut_short_was_never_acted_on(tmp_path: Path) -> None:
    path = tmp_path / LEDGER_FILE
    ledger = PrivacyLedger(path)
    ledger.charge("ab", 1, COSTS, run="r", name="n")
    whole = path.read_bytes()
    ledger.charge("ab", 2, COSTS, run="r", name="n")
    for size in range(len(whole) + 1, path.stat().st_size):
        path.write_bytes(path.read_bytes()[:size])
    path.write_bytes(path.read_bytes()[:-1])
    again = PrivacyLedger(path)
    assert again.runs["ab"].round == 1
    assert path.read_bytes() == whole
    again.charge("ab", 2, COSTS, run="r", name="n")
    assert PrivacyLedger(path).runs["ab"].count == 2
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["garbled", "another version", "gone", "older"])
def test_a_ledger_that_was_lost_is_never_taken_for_an_empty_one(damage: str, tmp_path: Path) -> None:
    path = tmp_path / LEDGER_FILE
    ledger = PrivacyLedger(path)
    for round_ in (1, 2):
        ledger.charge("ab", round_, COSTS, run="r", name="n")
    lines = path.read_text().splitlines(keepends=True)
    if damage == "gone":
        path.unlink()
    else:
        lines[1] = {"garbled": "{}\n", "another version": '{"version": 9}\n', "older": ""}[damage]
        path.write_text("".join(lines))
    with pytest.raises(StateError, match="restore the newest copy"):
        PrivacyLedger(path, at_least=2)


def test_what_cannot_be_written_is_not_charged(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path / "gone" / LEDGER_FILE)
    with pytest.raises(StorageError):
        ledger.charge("ab", 1, COSTS, run="r", name="n")
    assert ledger.runs == {}


def test_a_damaged_answer_is_said_to_be(tmp_path: Path) -> None:
    AnswerShelf(tmp_path).put("ab", Answer(1, b"body", b""))
    (tmp_path / "ab.answer").write_bytes(b'{"round": 1, "body": 9}\nbo')
    with pytest.raises(StateError, match="counts as answered"):
        AnswerShelf(tmp_path).get("ab")


# For each order on its standard input, a fork answers rounds 1 to 3 as an agent does, armed with a crash
# point and with bytes that no other attempt would have, and writes what leaves the device to a file.
LIVES = """
import asyncio, json, os, sys
from pathlib import Path
from fedpeft.runtime.crash_points import arm
from fedpeft.privacy.accountant import epsilon
from fedpeft.privacy.events import Local
from fedpeft.config.device_task import device_task
from fedpeft.config.run_file import run_digest
from fedpeft_client.policy.answers import Answer
from fedpeft.errors import PrivacyError
from tests.client.test_privacy_ledger import accountant, private

async def live(folder):
    book, run = accountant(folder), private()
    digest = run_digest(run)
    for round_ in (1, 2, 3):
        try:
            answer = book.get_answer(digest, round_, "study-1")
        except PrivacyError:
            continue
        if answer is None:
            await book.charge(digest, round_, run, device_task(run).text, server_run="study-1")
            answer = Answer(round_, os.urandom(8), b"")
            book.keep_answer(digest, answer)
        with (folder / "left").open("a") as left:
            left.write(f"{round_} {answer.body.hex()}\\n")

epsilon([Local(noise_multiplier=8.0)], 1e-5)  # so that the forks have the accountant's libraries
for line in sys.stdin:
    order = json.loads(line)
    pid = os.fork()
    if not pid:
        arm(order["crash_at"])
        asyncio.run(live(Path(order["folder"])))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
MINE = [point for point in POINTS if point.startswith(("agent.privacy.", "agent.answer."))]


@pytest.mark.slow
def test_killed_at_any_point_a_round_is_paid_for_once_and_released_once(tmp_path: Path) -> None:
    assert len(MINE) >= 5
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, "-c", LIVES]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as lives:
        for point, passes in itertools.product(MINE, (1, 2)):
            folder = tmp_path / f"{point}-{passes}"
            folder.mkdir()
            for crash_at in (f"{point}:{passes}", "", ""):
                assert live(lives, folder, crash_at) == (-9 if crash_at else 0), crash_at
            check_releases(folder)
        lives.communicate(timeout=60)


def live(lives: subprocess.Popen[str], folder: Path, crash_at: str) -> int:
    assert lives.stdin is not None
    assert lives.stdout is not None
    lives.stdin.write(json.dumps({"folder": str(folder), "crash_at": crash_at}) + "\n")
    lives.stdin.flush()
    return int(lives.stdout.readline())


def check_releases(folder: Path) -> None:
    """Each round left with one draw of noise, and each is in the ledger once, at its full price."""
    left = {tuple(line.split()) for line in (folder / "left").read_text().splitlines()}
    assert sorted(round_ for round_, _ in left) == ["1", "2", "3"]
    lines = [json.loads(line) for line in (folder / LEDGER_FILE).read_text().splitlines()]
    assert [line["round"] for line in lines if "charge" in line] == [1, 2, 3]
    assert [line["round"] for line in lines if "answer" in line] == [1, 2, 3]
    account = accountant(folder).ledger.runs[run_digest(private())]
    assert account.epsilon == pytest.approx(cost([Local(noise_multiplier=8.0)] * 3))
