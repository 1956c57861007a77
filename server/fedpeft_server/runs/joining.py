"""Agents that come after a run's roll call: greeted beside its rounds, and in the draws from the next one on.

Nobody waits for them. Before each round, agents that are connected and unknown are asked who they are and
what they hold, which may take them minutes; whoever has answered since the round before is in the roster from
this one on. The roster says since which round, and is durable before the round's cohort is drawn from it: so
the seed and the roster give each round's cohort again, also of the rounds before somebody joined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

from fedpeft.config.client_groups import own_base_of
from fedpeft.config.run_plugins import plugins_of, plugins_text
from fedpeft.config.sections import ClientLevelPrivacy, RunConfig
from fedpeft.errors import FederationError, FedPEFTError
from fedpeft.transport.roster import Member, Roster, check_plugins
from fedpeft.transport.tasks import HELLO, Hello, Task, read_hello, task_content


class Strangers(Protocol):
    """A run's way to agents that may join it."""

    @property
    def greeter(self) -> Grid:
        """For greetings alone: what is pushed here stays when rounds go on, and a pull waits for nothing."""
        ...

    def here(self) -> Mapping[str, int]:
        """Agents that are connected and may take part, with their nodes."""
        ...

    def know(self, agents: Iterable[str]) -> None:
        """Make these addressable to the round loop, connected or not."""
        ...

    def tell(self, agent: str, text: str) -> None:
        """Say something to an agent's owner."""
        ...


def reason_joining_is_closed(run: RunConfig) -> str:
    """Why nobody may join a run after its roll call; empty: they may."""
    if isinstance(run.privacy, ClientLevelPrivacy):
        return "its privacy is that of a cohort drawn from the clients that it began with"
    return ""


class Joining:
    """One run's newcomers.

    Args:
        check: refuses a roster.
        keep: makes a roster durable, and returns what is kept.
        say: writes a line into the run's log.
        is_open: whether a round's cohort is drawn already.
    """

    def __init__(
        self,
        run: RunConfig,
        strangers: Strangers,
        *,
        check: Callable[[Roster], None],
        keep: Callable[[Roster], Roster],
        say: Callable[[str], None],
        is_open: Callable[[int], bool],
    ) -> None:
        self._strangers, self._closed, self._own_base = (
            strangers,
            reason_joining_is_closed(run),
            own_base_of(run),
        )
        self._check, self._keep, self._say, self._is_open = check, keep, say, is_open
        self._plugins = plugins_text(plugins_of(run))
        self._task: Task | None = None
        self._roster = Roster({}, "")
        self._common = ""  # the run's own base model, where the first who holds it is a newcomer
        self._asked: dict[str, tuple[str, int]] = {}  # by name: the message's id, and the node
        self._answered: set[str] = set()  # with a no, by them or by us; asked anew when they come anew

    def begin(self, task: Task, roster: Roster) -> None:
        """The roll was called: with this task, and this outcome."""
        self._task, self._roster = task, roster

    def before(self, number: int) -> Roster:
        """The roster that a round is to be drawn from; raises what `keep` does."""
        here = self._strangers.here()
        self._answered &= here.keys()
        fresh = here.keys() - self._roster.members.keys() - self._asked.keys() - self._answered
        if self._closed:
            for name in sorted(fresh):
                self._turn_away(name, f"it came after the roll call, and {self._closed}")
        elif fresh:
            self._greet({name: here[name] for name in sorted(fresh)})
        came = self._welcome(number) if self._asked else {}
        if came:
            self._strangers.know(came)
            base = self._roster.base_digest or self._common
            members = {**self._roster.members, **came}
            self._roster = self._keep(replace(self._roster, members=members, base_digest=base))
        return self._roster

    def _greet(self, nodes: Mapping[str, int]) -> None:
        if self._task is None:
            raise FederationError("a newcomer is to be greeted and the roll was not called")
        content = task_content(self._task)
        messages = [Message(content, node, HELLO, group_id="0") for node in nodes.values()]
        ids = self._strangers.greeter.push_messages(messages)
        self._asked |= {name: (id_, nodes[name]) for name, id_ in zip(nodes, ids, strict=True)}

    def _welcome(self, number: int) -> dict[str, Member]:
        """Those who have answered and may join."""
        since = number + self._is_open(number)
        names = {node: name for name, (_, node) in self._asked.items()}
        found = {}
        for reply in self._strangers.greeter.pull_messages([id_ for id_, _ in self._asked.values()]):
            node = reply.metadata.src_node_id
            name = names[node]
            del self._asked[name]
            try:
                found[name] = self._member(read_hello(reply), node, since)
            except FedPEFTError as error:
                self._turn_away(name, " ".join(str(error).split()))
        return found

    def _member(self, hello: Hello, node: int, since: int) -> Member:
        """A newcomer that holds the base model which the others hold.

        Raises:
            FederationError: it holds another one.
        """
        check_plugins(hello, self._plugins)
        place, base = self._own_base(hello.client), self._roster.base_digest or self._common
        if place is not None:
            held = (self._roster.base_of(n) for n in self._roster.names if self._own_base(n) == place)
            base = next(held, hello.base_digest)
        if hello.base_digest != (base or hello.base_digest):
            raise FederationError(
                f"it holds base model {hello.base_digest[:12]} and the run's clients hold {base[:12]}; all"
                " need the same files, versions and quantisation"
            )
        common, own = (hello.base_digest, "") if place is None else ("", hello.base_digest)
        member = Member(node, hello.examples, own, since)
        self._check(Roster({hello.client: member}, common))
        self._common = self._common or common
        return member

    def _turn_away(self, name: str, reason: str) -> None:
        self._answered.add(name)
        self._say(f"{name} does not join the run: {reason}")
        self._strangers.tell(name, f"it is not asked in this run: {reason}")
