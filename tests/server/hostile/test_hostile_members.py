"""Members of the cohort who answer with what must not count: the others' round ends as without them."""

from __future__ import annotations

import asyncio
import hashlib
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fedpeft.transport.tasks import Task
from fedpeft.updates.update import arrays_digest
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.v1 import update_pb2
from fedpeft.wire.checksum import seal
from fedpeft.wire.codec import Envelope, encode
from fedpeft_client.transport.session import Session
from fedpeft_server.transport.grpc_event_loop import get_grpc_event_loop
from fedpeft_server.transport.refusals import Reason
from tests.server.fleet import played, wait_for
from tests.server.hostile.apps import envelope_for
from tests.server.hostile.attacker import Answer, Attacker, named, new_name, pieces, update_body
from tests.server.hostile.scene import PATIENCE_S, Scene, counted, expected


def changed(change: Callable[[Envelope], Envelope]) -> Answer:
    """An update that is honest but for one thing, signed by its sender as it is."""

    async def answer(self: Attacker, link: Session, task: pb.Task, asked: Task) -> None:
        await self.send(link, task, encode(change(envelope_for(asked, self.name, "plain", like="ada"))))

    return answer


def filled(value: float) -> Answer:
    return changed(lambda e: replace(e, arrays={n: np.full_like(a, value) for n, a in e.arrays.items()}))


def signed(**changes: Any) -> Answer:
    """An honest update whose signature is over another header."""

    async def answer(self: Attacker, link: Session, task: pb.Task, asked: Task) -> None:
        body = update_body(encode(envelope_for(asked, self.name, "plain", like="ada")))
        blob = await self.pushed(link, task, body)
        signature = self.signature(task, body, **changes)
        await link.send(pb.AgentMessage(result=pb.Result(task=task.id, blob=blob, signature=signature)))

    return answer


async def tampered(self: Attacker, link: Session, task: pb.Task, asked: Task) -> None:
    """The signature is over the true body, of which one bit is turned."""
    body = bytearray(update_body(encode(envelope_for(asked, self.name, "plain", like="ada"))))
    signature = self.signature(task, bytes(body))
    body[len(body) // 2] ^= 1
    blob = await self.pushed(link, task, bytes(body))
    await link.send(pb.AgentMessage(result=pb.Result(task=task.id, blob=blob, signature=signature)))


async def torn(self: Attacker, link: Session, task: pb.Task, asked: Task) -> None:
    """A chunk that is not what its checksum says, then bytes that are not what was announced."""
    body = update_body(encode(envelope_for(asked, self.name, "plain", like="ada")))
    for data, crc in ((body[:100], 0), (body[::-1], None)):
        call = link._stub.PushBlob()
        opened = pb.BlobOpen(digest=hashlib.sha256(body).digest(), size=len(body), task=task.id)
        await call.write(pb.BlobUpload(open=opened))
        await call.read()
        for piece in pieces(data, 8192):
            if crc is not None:
                piece.chunk.crc32 = crc
            await call.write(piece)
        assert "UpdateError" in (await call.read()).refused
        await call.done_writing()
    await self.declines(link, task)


async def replayed(self: Attacker, link: Session, task: pb.Task, asked: Task) -> None:
    """Round 1's update, with its signature, for every round; and for the first round again in the second."""
    kept: list[pb.Result] = self.scene.__dict__.setdefault(f"kept-{self.name}", [])
    if not kept:
        body = update_body(encode(envelope_for(asked, self.name, "plain", like="ada")))
        kept.append(pb.Result(task=task.id, signature=self.signature(task, body, round=9), inline=body))
    first = kept[0]
    await link.send(pb.AgentMessage(result=first))
    again = pb.Result(task=task.id, signature=first.signature, inline=first.inline)
    await link.send(pb.AgentMessage(result=again))


async def of_another(self: Attacker, link: Session, task: pb.Task, asked: Task) -> None:
    """A result under the id of a task that is not its own, a body that is another's, then nothing."""
    foreign = hashlib.sha256(task.id).digest()[:16]
    await link.send(pb.AgentMessage(result=pb.Result(task=foreign, inline=b"x", signature=b"s" * 70)))
    call = link._stub.PullBlob(pb.PullBlobRequest(digest=b"d" * 32, task=foreign))
    assert "no task of this agent" in await call.details()
    await self.declines(link, task)


async def unreadable(self: Attacker, link: Session, task: pb.Task, asked: Task) -> None:
    await self.deliver(link, task, b"\xff" * 300)


async def no_digest(self: Attacker, link: Session, task: pb.Task, asked: Task) -> None:
    """A name far too long for a file; the session ends, and on the next one the task is declined."""
    if task.id in _SEEN:
        await self.declines(link, task)
        return
    _SEEN.add(task.id)
    blob = pb.BlobRef(digest=b"/" * 5000, size=5)
    await link.send(pb.AgentMessage(result=pb.Result(task=task.id, blob=blob, signature=b"s")))


async def no_blob(self: Attacker, link: Session, task: pb.Task, asked: Task) -> None:
    """A result whose content never came."""
    blob = pb.BlobRef(digest=b"d" * 32, size=5)
    await link.send(pb.AgentMessage(result=pb.Result(task=task.id, blob=blob, signature=b"s")))


def bomb(tensor: bytes) -> Answer:
    """A few bytes that stand for tensors as large as they say."""

    async def answer(self: Attacker, link: Session, task: pb.Task, asked: Task) -> None:
        honest = encode(envelope_for(asked, self.name, "ternary", like="ada"))
        message = update_pb2.Update.FromString(honest[:-9])
        message.ternary.tensors[:] = [tensor] * len(message.ternary.tensors)
        await self.send(link, task, seal([message.SerializeToString()]))

    return answer


def coded(head: bytes, body: bytes) -> bytes:
    unsigned = head + body
    return unsigned + struct.pack("<I", zlib.crc32(unsigned))


HUGE_SIDE = b"\x80\x80\x80\x80\x80\x40"  # 2^41 as a varint
_SEEN: set[bytes] = set()  # ids of tasks that an attack was at before


@dataclass(frozen=True)
class Case:
    answer: Answer
    reasons: tuple[Reason, ...]


U, S = (Reason.UPDATE,), (Reason.SIGNATURE,)
CASES = {
    "NaN bomb": Case(filled(float("nan")), U),
    "infinite": Case(filled(float("inf")), U),
    "beyond every range": Case(filled(1e30), U),
    "wrong shapes": Case(
        changed(lambda e: replace(e, arrays={n: np.append(a, a) for n, a in e.arrays.items()})), U
    ),
    "wrong names": Case(changed(lambda e: replace(e, arrays={f"x{n}": a for n, a in e.arrays.items()})), U),
    "wrong kind of numbers": Case(
        changed(lambda e: replace(e, arrays={n: a.astype(np.int64) for n, a in e.arrays.items()})), U
    ),
    "weighs a million": Case(changed(lambda e: replace(e, weight=2**40)), U),
    "forged round in the update": Case(changed(lambda e: replace(e, round=e.round + 1)), U),
    "another run's update": Case(changed(lambda e: replace(e, run_digest="0" * 64)), U),
    "in another's name": Case(changed(lambda e: replace(e, client="ada")), U),
    "from another state": Case(changed(lambda e: replace(e, state_digest="0" * 64)), U),
    "no update at all": Case(unreadable, U),
    "signed for another round": Case(signed(round=7), S),
    "signed for another kind of task": Case(signed(kind="query.hello"), S),
    "signed for another run": Case(signed(run_id="other-1"), S),
    "signed for another run file": Case(signed(run_digest="ab" * 32), S),
    "signed in another's name": Case(signed(client="ada"), S),
    "one bit turned": Case(tampered, S),
    "bytes changed on the way": Case(torn, (Reason.CHANGED,)),
    "replayed": Case(replayed, (Reason.SIGNATURE, Reason.NOT_ASKED)),
    "another agent's task": Case(of_another, (Reason.NOT_ASKED,)),
    "no digest": Case(no_digest, (Reason.MALFORMED,)),
    "content that never came": Case(no_blob, (Reason.STORED,)),
}
BOMBS = {
    "declares a huge tensor": coded(b"\x01\x02\x02" + HUGE_SIDE * 2, b"\0" * 8),
    "declares a thousand dimensions": coded(b"\x01\x02\xff\x07" + b"\x02" * 1023, b"\0" * 8),
    "declares two billion entries": coded(b"\x01\x02\x01\xa0\x1f", b"\xff\xff\xff\xff\x07" * 8),
    "is cut": coded(b"\x01\x02\x02", b""),
}

QUICK = {  # one of each kind; the others are for the tests that take longer
    "NaN bomb",
    "wrong shapes",
    "forged round in the update",
    "signed for another round",
    "one bit turned",
    "bytes changed on the way",
    "replayed",
    "another agent's task",
    "no digest",
}


def attacked(scene: Scene, name: str, answer: Answer) -> tuple[str, str]:
    """The digest in which a run ends that has one such member, and that member's name."""
    name = new_name(name.replace(" ", "-").replace("'", ""))

    async def begun() -> Attacker:
        return Attacker(scene, name, scene.device(name))

    attacker = played(begun())
    under_way = asyncio.run_coroutine_threadsafe(attacker.member(answer), get_grpc_event_loop())
    try:
        digest = scene.hold(name)
    finally:
        get_grpc_event_loop().call_soon_threadsafe(attacker.over.set)
        scene.running.disconnect(name, "the run is over")
        under_way.result(PATIENCE_S)
    return digest, name


def test_the_undisturbed_run_ends_where_arithmetic_says(undisturbed: str) -> None:
    assert undisturbed == arrays_digest(expected())


@pytest.mark.parametrize("case", [named(case, QUICK) for case in sorted(CASES)])
def test_the_honest_round_ends_in_the_same_bytes(plain: Scene, undisturbed: str, case: str) -> None:
    digest, name = attacked(plain, case, CASES[case].answer)
    assert digest == undisturbed
    for reason in CASES[case].reasons:
        wait_for(lambda reason=reason: counted(plain.running, name).get(reason, 0) >= 2, PATIENCE_S)  # type: ignore[misc]


@pytest.mark.parametrize("case", [named(case, {"declares a huge tensor"}) for case in sorted(BOMBS)])
def test_a_compressed_bomb_is_refused_before_it_is_unpacked(
    ternary: Scene, undisturbed_ternary: str, case: str
) -> None:
    digest, name = attacked(ternary, case, bomb(BOMBS[case]))
    assert digest == undisturbed_ternary
    wait_for(lambda: counted(ternary.running, name).get(Reason.UPDATE, 0) == 2, PATIENCE_S)
