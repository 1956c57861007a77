"""Which versions of the protocol agents and servers speak: the newest, and the one before if it can be.

An agent says the newest version that it speaks. A server answers with the newest that both speak, and the
agent goes on if that is within its own window. So the two are updated in either order, one version at a time.

The window begins at 3. Under 2 a device told a server the texts of its errors, and a server told devices the
whole run file; those fields are gone from the schema, so a peer of version 2 can't be worked with.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.errors import ProtocolError


@dataclass(frozen=True)
class ProtocolWindow:
    """The versions that one program speaks: `oldest` to `newest`, at most two."""

    oldest: int
    newest: int

    def __post_init__(self) -> None:
        if not 1 <= self.oldest <= self.newest <= self.oldest + 1:
            raise ValueError(f"a window of protocol versions {self.oldest} to {self.newest} cannot be")

    def __str__(self) -> str:
        return str(self.newest) if self.oldest == self.newest else f"{self.oldest} and {self.newest}"

    def answer(self, came: int) -> int:
        """Return the version in which a server works with an agent whose newest version came.

        Raises:
            ProtocolError: the two have none in common; it says which of them is to be updated.
        """
        if came < self.oldest:
            raise ProtocolError(
                f"protocol version {came} came and this server speaks {self}; update fedpeft at the agent"
            )
        if came > self.newest + 1:
            raise ProtocolError(
                f"protocol version {came} came and this server speaks {self}; update fedpeft at the server"
            )
        return min(came, self.newest)

    def accept(self, answered: int) -> int:
        """Return the version that a server answered, if an agent speaks it.

        Raises:
            ProtocolError: it doesn't; the line says which of the two is to be updated.
        """
        if answered < self.oldest:
            raise ProtocolError(
                f"the server speaks protocol version {answered} and this agent {self};"
                " update fedpeft at the server"
            )
        if answered > self.newest:
            raise ProtocolError(
                f"the server speaks protocol version {answered} and this agent {self}; update fedpeft here"
            )
        return answered


PROTOCOL = ProtocolWindow(oldest=3, newest=3)
NEWEST_PROTOCOL = PROTOCOL.newest
