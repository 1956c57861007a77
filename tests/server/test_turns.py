"""Turns: one each, to whoever waited longest since its last, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress

import pytest

from fedpeft_server.transport.fair_queue import FairQueue, Turn
from fedpeft_server.transport.refusals import Reason, Refused


class Hall:
    """Turns by a clock that is moved by hand, and the order in which they were had."""

    def __init__(self, places: int) -> None:
        self.now, self.order = 0.0, list[str]()
        self.turns = FairQueue(places, 10.0, lambda: self.now)
        self._leave: dict[str, list[asyncio.Event]] = {}

    async def queue(self, name: str) -> asyncio.Task[None]:
        """A caller that waits for a turn, and has it until it is told to leave."""
        left = asyncio.Event()
        self._leave.setdefault(name, []).append(left)

        async def had() -> None:
            async with self.turns.turn(name):
                self.order.append(name)
                await left.wait()

        task = asyncio.create_task(had())
        await settled()
        return task

    async def leave(self, name: str) -> None:
        self._leave[name].pop(0).set()
        await settled()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def held(play: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await play()

    asyncio.run(main())


def test_whoever_asks_a_hundred_times_has_one_turn_between_those_of_others() -> None:
    async def play() -> None:
        hall = Hall(1)
        greedy = [await hall.queue("greedy") for _ in range(100)]
        others = [await hall.queue(name) for name in ("ada", "bob")]
        for name in ("greedy", "ada", "bob"):
            await hall.leave(name)
        assert hall.order == ["greedy", "ada", "bob", "greedy"]
        again = await hall.queue("ada")
        await hall.leave("greedy")
        assert hall.order[-1] == "ada"
        for task in (*greedy, *others, again):
            task.cancel()

    held(play)


def test_one_place_each_though_more_are_free() -> None:
    async def play() -> None:
        hall = Hall(3)
        tasks = [await hall.queue(name) for name in ("greedy", "greedy", "ada")]
        assert hall.order == ["greedy", "ada"]
        await hall.leave("greedy")
        assert hall.order == ["greedy", "ada", "greedy"]
        for task in tasks:
            task.cancel()

    held(play)


def test_a_turn_ends_only_when_its_time_is_over_and_someone_waits() -> None:
    async def play() -> None:
        hall = Hall(1)
        async with hall.turns.turn("slow") as turn:
            hall.now = 1000.0
            turn.check()
            waiting = await hall.queue("ada")
            with pytest.raises(Refused) as caught:
                turn.check()
            assert caught.value.reason is Reason.TURN
            fresh = Turn(hall.turns, since=995.0)
            fresh.check()
        await settled()
        assert hall.order == ["ada"]
        waiting.cancel()

    held(play)


def test_whoever_is_cut_off_while_it_waits_or_in_its_turn_leaves_the_place() -> None:
    async def play() -> None:
        hall = Hall(1)
        first, second, third = [await hall.queue(name) for name in ("ada", "bob", "cyd")]
        second.cancel()
        await settled()
        first.cancel()
        await settled()
        assert hall.order == ["ada", "cyd"]
        third.cancel()
        await settled()
        async with AsyncExitStack() as stack:
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await stack.enter_async_context(hall.turns.turn("dan"))
                    hall.order.append("dan")
        assert hall.order[-1] == "dan"

    held(play)
