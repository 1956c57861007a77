"""A submitter with a certificate of its own who wants other people's runs, and more than its share."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
import tomli_w

from fedpeft.cli import main
from fedpeft.credentials import Role, make_request, new_key, read_material
from fedpeft.errors import CredentialError, FedPEFTError, LimitError, UsageError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.v1 import federation_pb2_grpc as rpc
from fedpeft.wire.protocol import NEWEST_PROTOCOL
from fedpeft_client.transport.admin_client import AdminClient, run_and_answer
from fedpeft_client.transport.device_certificate import own_material
from fedpeft_client.transport.dialing import error_of, open_channel
from tests.server.fleet import wait_for
from tests.server.hostile.attacker import ENDINGS, ended
from tests.server.hostile.house import SECRET, House, asked, house, refusal, submit, tables, token_for

RUN_CALLS: dict[str, Callable[[str], tuple[str, Any]]] = {
    "show": lambda run: ("ShowRun", pb.RunRequest(id=run)),
    "logs": lambda run: ("Logs", pb.LogsRequest(id=run)),
    "logs, followed": lambda run: ("Logs", pb.LogsRequest(id=run, follow=True)),
    "stop": lambda run: ("StopRun", pb.StopRunRequest(id=run, reason="mine now")),
    "remove": lambda run: ("RemoveRun", pb.RunRequest(id=run)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("house")) as open_house:
        yield open_house


@pytest.fixture
def unharmed(made: House) -> Iterator[House]:
    """The house, of which nothing of ada's may have changed or got into the audit log afterwards."""
    before, entries = made.standing(), made.entries()
    yield made
    assert made.standing() == before
    new = made.entries()[len(entries) :]
    done = [entry for entry in new if entry.action != "refused"]
    assert [entry for entry in done if entry.subject in (made.finished.id, made.waiting.id)] == []
    shown: pb.RunInfo = asked(made.member("ada"), "ShowRun", pb.RunRequest(id=made.finished.id))
    assert shown.submitter == "ada", "the honest are served as before"


@pytest.mark.parametrize("what", sorted(RUN_CALLS))
def test_anothers_run_is_as_one_that_is_not_there(unharmed: House, what: str) -> None:
    eve = unharmed.member("eve")
    absent = refusal(asked, eve, *RUN_CALLS[what]("nobody-99"))
    for stored in (unharmed.finished, unharmed.waiting, unharmed.shared):
        error = refusal(asked, eve, *RUN_CALLS[what](stored.id))
        assert type(error) is type(absent) is UsageError
        assert str(error).replace(stored.id, "nobody-99") == str(absent)


def pulled(desk: AdminClient, run: str, out: Path) -> object:
    return run_and_answer(desk.pull(run, out))


def test_nothing_of_anothers_run_is_pulled_or_listed(unharmed: House, tmp_path: Path) -> None:
    eve = unharmed.member("eve")
    for stored in (unharmed.finished, unharmed.waiting, unharmed.shared):
        error = refusal(pulled, eve, stored.id, tmp_path / "pulled")
        assert "there is no run" in str(error)
    assert list(tmp_path.iterdir()) == []
    assert list(asked(eve, "ListRuns", pb.ListRunsRequest()).runs) == []
    assert "ada" not in str(asked(eve, "ListRuns", pb.ListRunsRequest(limit=1)))


@pytest.mark.parametrize(
    "name",
    ["../runs/{}", "{}/../{}", "{}\x00", " {}", "{}\n", "{}/", "%", "*", "' OR 1=1 --", "", "{}" * 20_000],
)
def test_no_spelling_of_a_runs_id_is_another_run(unharmed: House, tmp_path: Path, name: str) -> None:
    eve, run = unharmed.member("eve"), name.replace("{}", unharmed.finished.id)
    for what in sorted(RUN_CALLS):
        assert isinstance(refusal(asked, eve, *RUN_CALLS[what](run)), UsageError)
    refusal(pulled, eve, run, tmp_path / "pulled")


def test_a_reader_reads_and_does_no_more(unharmed: House, tmp_path: Path) -> None:
    bob, shared = unharmed.member("bob"), unharmed.shared.id
    listed: pb.ListRunsReply = asked(bob, "ListRuns", pb.ListRunsRequest())
    assert [info.id for info in listed.runs] == [shared]
    assert asked(bob, *RUN_CALLS["show"](shared)).submitter == "ada"
    asked(bob, *RUN_CALLS["logs"](shared))
    pulled(bob, shared, tmp_path / "pulled")
    assert (tmp_path / "pulled" / "adapter" / "adapter_model.safetensors").read_bytes() == SECRET
    for what in ("stop", "remove"):
        error = refusal(asked, bob, *RUN_CALLS[what](shared))
        assert isinstance(error, CredentialError)
        assert "belongs to 'ada', who lets 'bob' read it and no more" in str(error)
    for what in sorted(RUN_CALLS):
        assert "there is no run" in str(refusal(asked, bob, *RUN_CALLS[what](unharmed.waiting.id)))


def test_the_same_submission_as_anothers_gives_nothing_of_it_away(unharmed: House) -> None:
    """Names of submissions are their senders' own: guessing one gives no run of theirs, and takes none."""
    eve = unharmed.member("zed")
    for name in ("done", "idle", "open"):
        info = submit(eve, tables(f"ada-{name}"), name)
        assert info.submitter == "zed"
        assert info.id not in (unharmed.finished.id, unharmed.waiting.id, unharmed.shared.id)


def test_more_than_its_share_of_runs_and_rounds_is_refused(unharmed: House) -> None:
    greedy = unharmed.member("greedy")
    assert isinstance(refusal(submit, greedy, tables(rounds=101), "long"), LimitError)
    for number in range(3):
        submit(greedy, tables(f"part-{number}"), str(number))
    for number in range(3, 6):
        error = refusal(submit, greedy, tables(f"part-{number}"), str(number))
        assert "3 runs of 'greedy' have not ended, which is the most" in str(error)
    assert submit(greedy, tables("part-0"), "0").id.startswith("part-0-"), "that one was there"
    asked(greedy, *RUN_CALLS["stop"](asked(greedy, "ListRuns", pb.ListRunsRequest(limit=1)).runs[0].id))
    submit(greedy, tables("part-3"), "3")
    assert unharmed.running.refusals.of("greedy")["quota"] >= 4, "and it is counted"


def test_a_flood_of_submits_leaves_the_others_a_server(unharmed: House) -> None:
    """All at once, over several connections; the others are answered meanwhile, and the share holds."""
    flood, ada = unharmed.member("flood"), unharmed.member("ada")

    async def one(number: int) -> str:
        request = pb.SubmitRunRequest(run_toml=tomli_w.dumps(tables(f"f-{number}")), submission=str(number))
        try:
            async with flood.stub() as stub:
                await stub.SubmitRun(request)
        except grpc.aio.AioRpcError as error:
            return type(error_of(error, "server")).__name__
        return "taken"

    async def both() -> tuple[list[str], int]:
        submits = [asyncio.create_task(one(number)) for number in range(60)]
        served = 0
        while not all(task.done() for task in submits):
            await ada.call(lambda stub: stub.ShowRun(pb.RunRequest(id=unharmed.finished.id)))
            served += 1
        return [task.result() for task in submits], served

    answers, served = run_and_answer(both())
    assert answers.count("taken") == 3
    assert set(answers) == {"taken", "LimitError"}
    assert served >= 1


BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "an escape in the run's name": (tables("\x1b]0;owned\x07"), {}),
    "a line break in the run's name": (tables("tiny\nadmin stopped"), {}),
    "a path as the run's name": (tables("../../state"), {}),
    "an escape in an agent's name": (tables(), {"cohort": pb.CohortRules(agents=["\x1b[2J"])}),
    "an escape in a reader's name": (tables(), {"readers": ["\x1b[2J"]}),
    "a pattern as a reader": (tables(), {"readers": ["**"]}),
    "too many readers": (tables(), {"readers": ["bob"] * 5000}),
    "a key that is none": (tables() | {"\x1b[31mred": 1}, {}),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_names_that_would_write_on_a_terminal_are_refused(unharmed: House, name: str) -> None:
    made_, more = BROKEN[name]
    error = refusal(submit, unharmed.member("eve"), made_, name, **more)
    assert all(mark.isprintable() or mark == "\n" for mark in str(error)), repr(str(error))
    assert asked(unharmed.member("eve"), "ListRuns", pb.ListRunsRequest()).runs == []


def own_files(made: House) -> dict[str, dict[str, Any]]:
    """Run files that name what lies on the server's disk, by what they are after."""
    state = made.store.folder
    adapter = made.store.run_folder(made.finished.id) / "adapter"
    columns = {"text": "{text}", "label": "label"}
    return {
        "another's adapter as rows": {"data": columns | {"test": str(adapter / "adapter_model.safetensors")}},
        "the state's database": {"data": columns | {"test": str(state / "state.db")}},
        "a pattern over the state": {"data": columns | {"test": f"{state}/*"}},
        "a way up": {"data": columns | {"test": "../../etc/passwd"}},
        "accounts": {"data": columns | {"test": "/etc/passwd"}},
        "the server's key": {"data": columns | {"test": str(made.folder / "federation/server/key.pem")}},
        "a loader that unpickles": {"data": columns | {"test": "datasets:pandas"}},
        "a loader with a file": {"data": columns | {"test": f"datasets:json:{state}/audit.head"}},
        "another's adapter as a model": {"model": {"path": str(adapter)}},
        "the state as a model": {"model": {"path": str(state)}},
        "a way up to a model": {"model": {"path": "../state"}},
    }


def test_no_file_of_the_server_is_read(unharmed: House) -> None:
    eve = unharmed.member("eve")
    for after, named in own_files(unharmed).items():
        wanted = tables()
        for section, keys in named.items():
            wanted[section] = {**wanted.get(section, {}), **keys}
        said = str(refusal(submit, eve, wanted, after))
        assert SECRET.decode() not in said, after
        assert "root:" not in said, after
        assert "BEGIN" not in said, after
        assert "roots" in said or "hub data set" in said or "OWNER/NAME" in said, f"{after}: {said}"
    assert asked(eve, "ListRuns", pb.ListRunsRequest()).runs == []


def test_an_expression_without_end_holds_nobody_up(unharmed: House) -> None:
    """Whether it is refused at once or when the model is there, the others are served and a stop counts."""
    knot = unharmed.member("knot")
    endless = {"method": "lora", "r": 2, "target_modules": "(.|..|...|....)+[?-]"}
    began, run = time.monotonic(), ""
    with suppress(FedPEFTError):
        run = submit(knot, tables("knot", peft=endless), "knot").id
    if run:
        stopped: pb.RunInfo = asked(knot, *RUN_CALLS["stop"](run))
        assert stopped.status in ("stopped", "failed")
    assert time.monotonic() - began < 120.0, "`re` alone would be at it for years"


def test_files_that_are_none_are_refused_with_a_line(unharmed: House) -> None:
    eve = unharmed.member("eve")
    for text in ("x" * 300_000, "a = " + "[" * 50_000, "\x00", "run = 1", "[[[", "=" * 1000, "é" * 140_000):
        request = pb.SubmitRunRequest(run_toml=text, submission="x")
        error = refusal(asked, eve, "SubmitRun", request)
        assert "internal" not in str(error).lower(), error
        assert len(str(error)) < 4000


def test_what_a_submitter_says_is_cleaned_where_it_is_printed(
    made: House, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reason goes to the run's log, to `run show`, and to the audit log; none of them acts on a screen."""
    poet = made.member("poet")
    run = submit(poet, tables("verse"), "verse").id
    reason = "\x1b]0;owned\x07 enough\nadmin: all is well\x1b[2J"
    asked(poet, "StopRun", pb.StopRunRequest(id=run, reason=reason))
    at = ("--server", made.running.address, "--keys", str(poet.keys))
    for words in (
        ("run", "show", run, *at),
        ("run", "list", *at),
        ("run", "logs", run, *at),
        ("server", "audit", "--state", str(made.store.folder)),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(list(words))
        out = capsys.readouterr().out
        assert "enough" in out
        assert all(mark.isprintable() or mark == "\n" for mark in out), repr(out)
        assert "\nadmin: all is well" not in out


def test_an_error_that_quotes_a_file_acts_on_no_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text('"\\u001b]0;owned\\u0007" = 1\n[run]\nname = "x"\nrounds = 1\n')
    with pytest.raises(SystemExit) as ended:
        main(["run", "submit", str(tmp_path / "run.toml"), "--server", "127.0.0.1:9"])
    said = capsys.readouterr().err
    assert ended.value.code == 3
    assert "owned" in said
    assert all(mark.isprintable() or mark == "\n" for mark in said), repr(said)


@pytest.mark.parametrize("name", ["admin", "server", "local", "authority", "root"])
def test_no_name_is_a_privilege(unharmed: House, name: str) -> None:
    somebody = unharmed.member(name)
    assert "there is no run" in str(refusal(asked, somebody, *RUN_CALLS["show"](unharmed.finished.id)))
    for method, request in (
        ("IssueToken", pb.IssueTokenRequest(name="mole", role="admin")),
        ("RevokeAgent", pb.RevokeAgentRequest(name="ada")),
    ):
        error = refusal(asked, somebody, method, request)
        assert isinstance(error, CredentialError)
    assert [entry for entry in unharmed.entries() if entry.action in ("invited", "revoked")] == []


def federation_call(desk: AdminClient, ask: Callable[[Any], Any]) -> Any:
    """A call of the agents' service, with a person's certificate."""

    async def call() -> Any:
        assert desk.keys is not None
        material = read_material(desk.keys, datetime.now(UTC))
        async with open_channel(desk.server, material) as channel:
            try:
                return await ask(rpc.FederationStub(channel))  # type: ignore[no-untyped-call]  # generated
            except grpc.aio.AioRpcError as error:
                raise error_of(error, desk.server) from error

    return run_and_answer(call())


def test_a_submitter_is_no_agent(unharmed: House) -> None:
    hello = pb.AgentMessage(hello=pb.Hello(protocol_version=NEWEST_PROTOCOL, name="north"))
    opened = pb.BlobUpload(open=pb.BlobOpen(digest=b"d" * 32, size=10, task=b"t" * 16))

    async def sent(call: Any, message: Any) -> tuple[grpc.StatusCode, str]:
        with suppress(*ENDINGS):
            await call.write(message)
        return await ended(call)

    for ask in (
        lambda stub: sent(stub.Session(), hello),
        lambda stub: sent(stub.PushBlob(), opened),
        lambda stub: ended(stub.PullBlob(pb.PullBlobRequest(digest=b"d" * 32, task=b"t" * 16))),
    ):
        code, details = federation_call(unharmed.member("eve"), ask)
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert "'eve' is submitter, and this needs agent" in details


def test_a_token_gives_what_its_admin_wrote_into_it_and_once(made: House, tmp_path: Path) -> None:
    """Whoever renews too early, asks with another's token, or comes a second time gets nothing."""
    eve = made.member("eve")

    def enrol(token: str) -> Any:
        csr = make_request(new_key())
        request = pb.EnrollRequest(protocol_version=NEWEST_PROTOCOL, token=token, csr=csr)
        return federation_call(eve, lambda stub: stub.Enroll(request))

    assert "can be renewed from" in str(refusal(enrol, ""))
    token = token_for(made, "west", Role.AGENT)
    mark, secret, fingerprint = token.split(".")
    guessed = ".".join((mark, secret[:-8] + "AAAAAAAA", fingerprint))
    assert isinstance(refusal(enrol, guessed), CredentialError)
    assert enrol(token).name == "west", "a token is worth one agent's certificate, whoever brings it"
    assert "used before, by another device" in str(refusal(enrol, token))
    with pytest.raises(CredentialError):
        run_and_answer(own_material(tmp_path / "west", made.running.address, token))
    made_by = [(entry.actor, entry.role, entry.action) for entry in made.entries() if entry.subject == "west"]
    assert made_by == [("west", "agent", "enrolled")]


def test_an_agents_certificate_calls_nothing_of_peoples(unharmed: House) -> None:
    agent = unharmed.member("north", Role.AGENT)
    for what in sorted(RUN_CALLS):
        error = refusal(asked, agent, *RUN_CALLS[what](unharmed.finished.id))
        assert isinstance(error, CredentialError)
    assert isinstance(refusal(submit, agent, tables(), "x"), CredentialError)


def test_a_revoked_submitter_hears_no_more_of_a_log_that_it_follows(made: House) -> None:
    gone, admin = made.member("gone"), made.member("root-admin", Role.ADMIN)
    run = submit(gone, tables("followed"), "followed").id
    made.store.runs.say(run, json.dumps({"event": "note", "text": "before"}))

    async def followed() -> str:
        lines = gone.lines(run, follow=True).__aiter__()
        await lines.__anext__()
        await admin.call(lambda stub: stub.RevokeAgent(pb.RevokeAgentRequest(name="gone", reason="left")))
        made.store.runs.say(run, json.dumps({"event": "note", "text": "after"}))
        heard = ""
        try:
            async for line in lines:
                heard += line.json
        except FedPEFTError as error:
            return f"{heard} {type(error).__name__}"
        return heard

    said = run_and_answer(followed())
    assert said.endswith("CredentialError")
    assert "after" not in said
    (entry,) = [entry for entry in made.entries() if entry.action == "revoked"]
    assert (entry.actor, entry.role, entry.subject) == ("root-admin", "admin", "gone")
    asked(admin, *RUN_CALLS["stop"](run))


def test_an_admin_does_everything_and_it_is_written_down(made: House, tmp_path: Path) -> None:
    admin = made.member("root-admin", Role.ADMIN)
    listed = asked(admin, "ListRuns", pb.ListRunsRequest()).runs
    assert {made.finished.id, made.waiting.id, made.shared.id} <= {info.id for info in listed}
    pulled(admin, made.shared.id, tmp_path / "pulled")
    asked(admin, *RUN_CALLS["stop"](made.waiting.id))
    asked(admin, *RUN_CALLS["remove"](made.shared.id))
    assert not made.store.run_folder(made.shared.id).exists()
    assert "removed" in str(refusal(pulled, admin, made.shared.id, tmp_path / "again"))
    mine = [(entry.action, entry.subject) for entry in made.entries() if entry.actor == "root-admin"]
    assert mine[-3:] == [
        ("pulled", made.shared.id),
        ("stopped", made.waiting.id),
        ("removed", made.shared.id),
    ]


def test_who_looks_at_anothers_runs_and_who_was_refused_is_on_the_record(made: House) -> None:
    """By name and role, once an hour each; what is one's own is nobody's business."""
    ada, bob, eve = (made.member(name) for name in ("ada", "bob", "curious"))
    root, device = made.member("root-reader", Role.ADMIN), made.member("a-device", Role.AGENT)
    asked(ada, *RUN_CALLS["show"](made.finished.id))
    for _ in range(2):
        asked(bob, *RUN_CALLS["show"](made.shared.id))
        asked(root, *RUN_CALLS["show"](made.finished.id))
        asked(root, "ListRuns", pb.ListRunsRequest())
        refusal(asked, eve, *RUN_CALLS["show"](made.finished.id))
        refusal(asked, bob, "StopRun", pb.StopRunRequest(id=made.shared.id))
        refusal(asked, eve, "RevokeAgent", pb.RevokeAgentRequest(name="ada"))
        refusal(asked, device, "ListRuns", pb.ListRunsRequest())
        refusal(asked, eve, *RUN_CALLS["show"]("none-7"))

    def noted() -> list[tuple[str, ...]]:
        return sorted(
            (entry.actor, entry.role, entry.action, entry.subject, json.loads(entry.detail)["call"])
            for entry in made.entries()
            if entry.action in ("read", "refused")
        )

    expected = [
        ("bob", "submitter", "read", made.shared.id, "ShowRun"),
        ("root-reader", "admin", "read", made.finished.id, "ShowRun"),
        ("root-reader", "admin", "read", "", "ListRuns"),
        ("curious", "submitter", "refused", made.finished.id, "ShowRun"),
        ("bob", "submitter", "refused", made.shared.id, "StopRun"),
        ("curious", "submitter", "refused", "", "a call for admins"),
        ("a-device", "agent", "refused", "", "a call for submitters"),
    ]
    wait_for(lambda: set(expected) <= set(noted()))
    assert [noted().count(entry) for entry in expected] == [1] * 7
    own = [entry for entry in noted() if entry[0] in ("ada", "curious", "root-reader", "a-device")]
    assert len(own) == 5
