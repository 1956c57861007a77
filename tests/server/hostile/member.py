"""A hostile member of a federation: everything it can try against a real server, in one short program.

    python -m tests.server.hostile.member

A server and two honest agents run as processes, with certificates. One run is held without the hostile
member and one with it, which answers a round with each of its forgeries and tries all that is not its
business beside them. It ends with nothing gained: the honest agents' adapter is the same, byte for byte, and
the server has told it nothing, kept nothing of its and written down none of its words.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import pickle
import sys
import tempfile
import threading
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from flwr.app import ConfigRecord, RecordDict

from fedpeft.config.run_file import load_run
from fedpeft.credentials import Material, UpdateHeader, read_material, sign_update
from fedpeft.participant.load_server import load_serving_run
from fedpeft.participant.loaded_run import LoadedRun
from fedpeft.transport.record_bytes import content_bytes, content_of
from fedpeft.transport.tasks import HELLO
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.v1 import federation_pb2_grpc as rpc
from fedpeft.wire.codec import Envelope, decode, encode
from fedpeft.wire.protocol import NEWEST_PROTOCOL
from fedpeft_client.transport.dialing import channel_credentials
from fedpeft_client.transport.session import Session
from tests.integration.site import RUN_FILE, Site, open_site, say, until

NAME, HONEST = "mallory", ("north", "south")
SPOKEN = b"\x1b[2J owned \r\n by mallory"  # words that a log must not hold
PICKLE = pickle.dumps({"mallory": "was here"})
SETTINGS = ("training.steps=1", "evaluation.every=100", "federation.deadline_s=60", "federation.quorum=0.5")


@dataclass
class Member:
    """The hostile member: its certificate, and what it found out."""

    address: str
    material: Material
    resident: LoadedRun
    forgeries: list[str] = field(default_factory=lambda: sorted(FORGERIES))
    tried: list[str] = field(default_factory=list)
    forged: list[str] = field(default_factory=list)  # one a round
    gained: list[str] = field(default_factory=list)

    def channel(self) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(
            self.address, channel_credentials(self.material), [("grpc.use_local_subchannel_pool", 1)]
        )

    async def live(self) -> None:
        """Answer tasks until cancelled, and try everything else once."""
        while True:
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                async with self.channel() as channel:
                    link = await Session.open(channel, NAME, {})
                    try:
                        async for message in link.messages():
                            if message.WhichOneof("message") == "task":
                                await self.answer(link, message.task)
                    finally:
                        link.close()
            await asyncio.sleep(0.2)

    async def answer(self, link: Session, task: pb.Task) -> None:
        """The roll call as one should, each round with the next forgery; then let the round go on."""
        body = await link.pull(task.id, task.blob, bytearray()) if task.HasField("blob") else task.inline
        if task.kind == HELLO:
            for name, attempt in TRESPASSES.items():
                await self.attempt(name, attempt, task)
            digest = self.resident.base_digest
            hello: dict[str, Any] = {"client": NAME, "examples": 10, "base-digest": digest}
            await self.send(link, task, content_bytes(RecordDict({"hello": ConfigRecord(hello)})))
            return
        state: Any = content_of(body, who="server").config_records["task"]["state"]
        name = self.forgeries.pop(0) if self.forgeries else sorted(FORGERIES)[0]
        self.tried.append(name)
        self.forged.append(name)
        await FORGERIES[name](self, link, task, self.honest(task, bytes(state)))

    def honest(self, task: pb.Task, state: bytes) -> Envelope:
        """An update that would be taken: it moves nothing, and all around it is right."""
        begun = decode(state, who="the server")
        return Envelope(
            {name: np.zeros_like(array) for name, array in begun.arrays.items()},
            task.run_digest.hex(),
            task.round,
            begun.state_digest,
            begun.space,
            client=NAME,
            weight=10,
            metrics={"loss": 0.0, "steps": 1.0, "examples": 10.0},
            base_digest=self.resident.base_digest,
            stages=self.resident.stage_list,
        )

    async def send(self, link: Session, task: pb.Task, body: bytes, **forged: Any) -> None:
        """A result, signed; `forged` are changes to the header under the signature."""
        fields: dict[str, Any] = {
            "run_id": task.run,
            "run_digest": task.run_digest.hex(),
            "round": task.round,
            "kind": task.kind,
            "client": NAME,
        }
        result = pb.Result(task=task.id)
        result.signature = sign_update(self.material.key, UpdateHeader(**(fields | forged)), body)
        if len(body) <= link.welcome.max_inline_bytes:
            result.inline = body
        else:
            result.blob.CopyFrom(await link.push(task.id, body, hashlib.sha256(body).digest()))
        await link.send(pb.AgentMessage(result=result))

    async def attempt(
        self, name: str, attempt: Callable[[Member, Any, Any, pb.Task], Any], task: pb.Task
    ) -> None:
        """One thing that is not its business; an answer that is no error is something gained."""
        self.tried.append(name)
        async with self.channel() as channel:
            federation: Any = rpc.FederationStub(channel)  # type: ignore[no-untyped-call]  # generated
            admin: Any = rpc.AdminStub(channel)  # type: ignore[no-untyped-call]
            try:
                got = await attempt(self, federation, admin, task)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return
        if got:
            self.gained.append(f"{name}: {got!r:.200}")


def body_of(payload: bytes) -> bytes:
    return content_bytes(RecordDict({"update": ConfigRecord({"payload": payload})}))


Forgery = Callable[[Member, Session, pb.Task, Envelope], Awaitable[None]]


def forged(change: Callable[[Envelope], Envelope]) -> Forgery:
    """An update that is honest but for one thing."""

    async def answer(self: Member, link: Session, task: pb.Task, honest: Envelope) -> None:
        await self.send(link, task, body_of(encode(change(honest))))

    return answer


def signed(**changes: Any) -> Forgery:
    """An update that is honest, under a signature for something else."""

    async def answer(self: Member, link: Session, task: pb.Task, honest: Envelope) -> None:
        await self.send(link, task, body_of(encode(honest)), **changes)

    return answer


def filled(value: float) -> Forgery:
    return forged(lambda e: replace(e, arrays={n: np.full_like(a, value) for n, a in e.arrays.items()}))


async def bytes_of_any_kind(self: Member, link: Session, task: pb.Task, honest: Envelope) -> None:
    await self.send(link, task, PICKLE)


async def pickled_update(self: Member, link: Session, task: pb.Task, honest: Envelope) -> None:
    await self.send(link, task, body_of(PICKLE))


async def words_of_its_own(self: Member, link: Session, task: pb.Task, honest: Envelope) -> None:
    """A failure and a refusal as older versions sent them, with a text; then one with a code of no list."""
    failure = pb.Failure.FromString(b"\x0a\x04Evil\x12" + bytes([len(SPOKEN)]) + SPOKEN)
    await link.send(pb.AgentMessage(result=pb.Result(task=task.id, failure=failure)))
    refusal = pb.Refusal.FromString(b"\x12" + bytes([len(SPOKEN)]) + SPOKEN)
    refusal.task = task.id
    await link.send(pb.AgentMessage(refusal=refusal))


async def metrics_with_words(self: Member, link: Session, task: pb.Task, honest: Envelope) -> None:
    """An update of another round, with names of metrics that would stand in a log."""
    words = SPOKEN.decode()
    update = replace(honest, round=honest.round + 1, metrics={words: 1.0}, space=words)
    await self.send(link, task, body_of(encode(update)))


FORGERIES: dict[str, Forgery] = {
    "NaN": filled(float("nan")),
    "infinite": filled(float("inf")),
    "beyond every range": filled(1e30),
    "wrong shapes": forged(lambda e: replace(e, arrays={n: np.append(a, a) for n, a in e.arrays.items()})),
    "wrong names": forged(lambda e: replace(e, arrays={f"x{n}": a for n, a in e.arrays.items()})),
    "integers": forged(lambda e: replace(e, arrays={n: a.astype(np.int64) for n, a in e.arrays.items()})),
    "weighs a million": forged(lambda e: replace(e, weight=2**40)),
    "weighs more than it said": forged(lambda e: replace(e, weight=5000)),
    "another round": forged(lambda e: replace(e, round=e.round + 1)),
    "another run": forged(lambda e: replace(e, run_digest="0" * 64)),
    "another's name": forged(lambda e: replace(e, client=HONEST[0])),
    "another state": forged(lambda e: replace(e, state_digest="0" * 64)),
    "another base": forged(lambda e: replace(e, base_digest="0" * 64)),
    "other stages": forged(lambda e: replace(e, stages=(("clip", "{}"),))),
    "signed for another round": signed(round=7),
    "signed for another run": signed(run_id="other-1"),
    "signed in another's name": signed(client=HONEST[0]),
    "bytes of any kind": bytes_of_any_kind,
    "a pickle as update": pickled_update,
    "words of its own": words_of_its_own,
    "metrics with words": metrics_with_words,
}


async def upload_a_pickle(self: Member, federation: Any, admin: Any, task: pb.Task) -> Any:
    """A blob for a task that is nobody's, and one in another's name."""
    for id_, metadata in ((b"t" * 16, ()), (task.id, (("fedpeft-agent", HONEST[0]),))):
        call = federation.PushBlob(metadata=metadata)
        opened = pb.BlobOpen(digest=hashlib.sha256(PICKLE).digest(), size=2 * len(PICKLE), task=id_)
        await call.write(pb.BlobUpload(open=opened))
        answer = await call.read()
        call.cancel()
        if isinstance(answer, pb.BlobProgress) and not answer.refused and id_ != task.id:
            return answer
    return None


async def read_anothers_blob(self: Member, federation: Any, admin: Any, task: pb.Task) -> Any:
    call = federation.PullBlob(
        pb.PullBlobRequest(digest=b"d" * 32, task=hashlib.sha256(task.id).digest()[:16])
    )
    return await call.read() or None


async def speak_as_another(self: Member, federation: Any, admin: Any, task: pb.Task) -> Any:
    call = federation.Session()
    await call.write(pb.AgentMessage(hello=pb.Hello(protocol_version=NEWEST_PROTOCOL, name=HONEST[0])))
    answer = await call.read()
    return answer if isinstance(answer, pb.ServerMessage) and answer.HasField("welcome") else None


async def a_second_certificate(self: Member, federation: Any, admin: Any, task: pb.Task) -> Any:
    return await federation.Enroll(
        pb.EnrollRequest(protocol_version=NEWEST_PROTOCOL, token="x" * 40, csr=b"no request")
    )


def asks(method: str, request: Any) -> Callable[[Member, Any, Any, pb.Task], Coroutine[Any, Any, Any]]:
    """A call that is for people with a role."""

    async def attempt(self: Member, federation: Any, admin: Any, task: pb.Task) -> Any:
        call = getattr(admin, method)(request)
        return await (call.read() if hasattr(call, "read") else call)

    return attempt


TRESPASSES: dict[str, Callable[[Member, Any, Any, pb.Task], Coroutine[Any, Any, Any]]] = {
    "uploads a pickle": upload_a_pickle,
    "reads another's blob": read_anothers_blob,
    "speaks as another": speak_as_another,
    "enrols again": a_second_certificate,
    "lists runs": asks("ListRuns", pb.ListRunsRequest()),
    "shows a run": asks("ShowRun", pb.RunRequest(id="three-agents-1")),
    "reads a log": asks("Logs", pb.LogsRequest(id="three-agents-1")),
    "pulls a result": asks("PullResult", pb.PullResultRequest(id="three-agents-1")),
    "submits": asks("SubmitRun", pb.SubmitRunRequest(run_toml='[run]\nname = "x"\nrounds = 1\n')),
    "stops a run": asks("StopRun", pb.StopRunRequest(id="three-agents-2", reason="because")),
    "lists agents": asks("ListAgents", pb.ListAgentsRequest()),
    "invites": asks("IssueToken", pb.IssueTokenRequest(name="eve", role="admin")),
    "revokes": asks("RevokeAgent", pb.RevokeAgentRequest(name=HONEST[0], reason="because")),
}


def hold(site: Site, agents: tuple[str, ...]) -> str:
    """A run of these agents to its end; its adapter's digest."""
    settings = [*SETTINGS, f"run.rounds={len(FORGERIES)}", f"data.partitioner.clients={len(agents)}"]
    words = [word for setting in settings for word in ("--set", setting)]
    words += [word for agent in agents for word in ("--agent", agent)]
    words += ["--min-agents", str(len(agents))]
    run_id = json.loads(site.call("run", "submit", RUN_FILE, *words, "--json"))["id"]
    say(f"{run_id} is held with {', '.join(agents)}")

    def ended() -> dict[str, Any] | None:
        shown: dict[str, Any] = json.loads(site.call("run", "show", run_id, "--json"))
        assert shown["status"] not in ("failed", "stopped"), shown
        return shown if shown["status"] == "finished" else None

    shown = until("the run's end", ended, 4.0)
    assert shown is not None
    return str(shown["adapter_digest"])


def folded_rounds(site: Site) -> list[int]:
    """The rounds of the last run whose sum has an update of the hostile member in it."""
    lines = site.call("run", "logs", "three-agents-2", "--json").splitlines()
    rounds = [row for row in map(json.loads, lines) if row.get("event") == "round" and row["round"]]
    assert len(rounds) == len(FORGERIES), "the log is read as it is written"
    found = []
    for row in rounds:
        (outcome,) = (outcome for outcome in row["outcomes"] if outcome["client"] == NAME)
        found += [row["round"]] * (outcome["status"] == "folded")
    return found


async def _live_until(member: Member, over: threading.Event) -> None:
    living = asyncio.create_task(member.live())
    await asyncio.to_thread(over.wait)
    living.cancel()
    await asyncio.gather(living, return_exceptions=True)


def trespass(folder: Path) -> Member:
    """The whole program; returns the member with what it tried.

    Raises:
        AssertionError: it gained something.
    """
    with open_site(folder) as site:
        agents = [word for name in (*HONEST, NAME) for word in ("--agent", name)]
        site.call("provision", "federation", "--host", "127.0.0.1", *agents, "--submitter", "ada")
        site.start_server()
        until("the server", lambda: "listening on" in site.log("server"))
        for name in HONEST:
            site.start_agent(name)
        alone = hold(site, HONEST)

        material = read_material(folder / "federation" / "agents" / NAME, datetime.now(UTC))
        member = Member(site.address, material, load_serving_run(load_run(Path(RUN_FILE))))
        over = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(_live_until(member, over)))
        thread.start()
        try:
            together = hold(site, (*HONEST, NAME))
        finally:
            over.set()
            thread.join(30)

        assert not (folded := [member.forged[number - 1] for number in folded_rounds(site)]), folded
        assert together == alone, "the adapter is another one than without the hostile member"
        assert not member.gained, member.gained
        assert sorted(set(member.tried)) == sorted({*FORGERIES, *TRESPASSES})
        written = [site.log("server").encode()]
        written += [path.read_bytes() for path in (folder / "state").rglob("*") if path.is_file()]
        assert not any(b"\x1b[2J" in content for content in written), "its words are in the server's files"
        assert not any(content == PICKLE for content in written), "its pickle is kept"
        assert "Traceback" not in site.log("server")
        say(f"{len(member.tried)} attempts, nothing gained: adapter {together[:12]} with it and without")
        return member


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        trespass(Path(made))
    sys.exit(0)
