"""Roll call: which client sits at which node, and whether all hold the same base model."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from fedpeft.config.run_plugins import difference
from fedpeft.errors import FederationError, FedPEFTError
from fedpeft.transport.message_exchange import exchange
from fedpeft.transport.tasks import HELLO, Hello, Task, read_hello, task_content

POLL_S = 0.2


@dataclass(frozen=True)
class Member:
    """One client: the node that speaks for it, its number of training rows, and the base model that it holds.

    `base_digest` is empty where that is the run's own. `since` is the first round that it may be asked in: 0
    of those who answered the roll call, later of those who joined.
    """

    node_id: int
    examples: int
    base_digest: str = ""
    since: int = 0


@dataclass(frozen=True)
class Roster:
    """All clients of a run by name, and the base model that they agree on.

    Clients of a group with a base of its own agree among themselves; `base_digest` is that of all others, and
    empty without any.
    """

    members: Mapping[str, Member]
    base_digest: str

    @property
    def names(self) -> list[str]:
        """Sorted names."""
        return sorted(self.members)

    @property
    def by_joining(self) -> list[str]:
        """Names in an order that stays as it is when others join: those since the same round sorted."""
        return sorted(self.members, key=lambda name: (self.members[name].since, name))

    def in_round(self, number: int) -> list[str]:
        """Sorted names of those that a round's cohort is drawn from."""
        return [name for name in self.names if self.members[name].since <= number]

    def names_joining(self, number: int) -> tuple[str, ...]:
        """Sorted names of those that joined with a round."""
        return tuple(name for name in self.names if self.members[name].since == number > 0)

    def base_of(self, client: str) -> str:
        """Fingerprint of the base model that a client holds."""
        return self.members[client].base_digest or self.base_digest

    @property
    def one_base(self) -> bool:
        """Whether all clients hold the same."""
        return not any(member.base_digest for member in self.members.values())


def roll_call(
    grid: Grid,
    task: Task,
    *,
    expected: int,
    timeout_s: float = 300.0,
    own_base: Callable[[str], int | None] = lambda client: None,
    plugins: str = "",
) -> Roster:
    """Wait for `expected` nodes, then ask each who it is.

    Args:
        task: the run that the nodes should load; its round and state aren't used.
        own_base: of a client that is in a group with a base of its own, the group's number.
        plugins: that the run uses at this end, as `plugins_text` says; whoever has others is left out where
            enough remain.

    Raises:
        FederationError: too few nodes in time, two nodes with one name, or too few with one base model;
            whoever holds another base than most is left out where enough remain.
        FedPEFTError: what a client replied, if too few could load the run.
    """
    nodes = _wait_for_nodes(grid, expected, timeout_s)
    content = task_content(task)
    messages = [Message(content, node, HELLO, group_id="0") for node in nodes]
    greetings: dict[int, Hello] = {}
    failures: list[FedPEFTError] = []
    for reply in exchange(grid, messages, timeout_s=timeout_s):
        try:
            hello = read_hello(reply)
            check_plugins(hello, plugins)
            greetings[reply.metadata.src_node_id] = hello
        except FedPEFTError as error:  # kept: raised below unless enough others could answer
            failures.append(error)
    if failures and len(greetings) < expected:
        raise failures[0]
    if not greetings:
        raise FederationError(f"none of {len(nodes)} nodes answered the roll call")
    _check_names(greetings)
    greetings, digests = _of_common_base(greetings, own_base, expected)
    common = digests.pop(None, "")
    members = {
        hello.client: Member(node, hello.examples, digests.get(own_base(hello.client), ""))
        for node, hello in sorted(greetings.items())
    }
    return Roster(members, common)


def check_plugins(hello: Hello, plugins: str) -> None:
    """Compare the plugins that a run uses at a client with those at this end.

    Raises:
        FederationError: name, version or digest of one differ.
    """
    differs = difference(plugins, hello.plugins)
    if differs:
        raise FederationError(
            f"{hello.client}: the run's plugins differ at both ends: {differs}; install the same version"
        )


def _wait_for_nodes(grid: Grid, expected: int, timeout_s: float) -> list[int]:
    """Nodes may register late: poll."""
    deadline = time.monotonic() + timeout_s
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= expected:
            return nodes
        if time.monotonic() > deadline:
            raise FederationError(
                f"{len(nodes)} nodes are connected after {timeout_s:g} s and {expected} are needed; start"
                " the others"
            )
        time.sleep(POLL_S)


def _check_names(greetings: Mapping[int, Hello]) -> None:
    counts = Counter(hello.client for hello in greetings.values())
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        raise FederationError(
            f"{counts[twice[0]]} nodes call themselves {twice[0]!r}; give each its own name or partition"
        )


def _of_common_base(
    greetings: Mapping[int, Hello], own_base: Callable[[str], int | None], expected: int
) -> tuple[dict[int, Hello], dict[int | None, str]]:
    """Return those who hold the base that most of their group hold, and that base's digest by group.

    Group None is the run itself. One member who says that it holds something else shall not keep the others.

    Raises:
        FederationError: fewer than `expected` would remain.
    """
    counts: dict[int | None, Counter[str]] = {}
    for hello in greetings.values():
        counts.setdefault(own_base(hello.client), Counter())[hello.base_digest] += 1
    digests = {place: count.most_common(1)[0][0] for place, count in counts.items()}
    kept = {
        node: hello
        for node, hello in greetings.items()
        if hello.base_digest == digests[own_base(hello.client)]
    }
    if len(kept) < min(expected, len(greetings)):
        others = [hello for node, hello in greetings.items() if node not in kept]
        places = {own_base(hello.client) for hello in others}
        place = min(places, key=lambda each: -1 if each is None else each)
        names = sorted(hello.client for hello in others if own_base(hello.client) == place)
        where = "" if place is None else f" within groups.{place}"
        raise FederationError(
            f"base models differ{where}: {len(names)} of {counts[place].total()} clients"
            f" ({', '.join(names[:3])}) hold another one than {digests[place][:12]}; all need the same files,"
            " versions and quantisation"
        )
    return kept, digests
