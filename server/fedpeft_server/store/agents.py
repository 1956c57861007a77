"""Which agents have been here, and when; beyond what is connected now."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import select

from fedpeft_server.store.database import Database
from fedpeft_server.store.schema import agents


@dataclass(frozen=True)
class Sighting:
    """When an agent was here first and last, in seconds since 1970."""

    name: str
    first_seen: float
    last_seen: float


class Agents:
    """Sightings of agents; raises StorageError when the database cannot be used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def record_seen(self, names: Collection[str]) -> None:
        """These are here now."""
        now = time.time()
        with self._database.writing() as connection:
            known = set(connection.execute(select(agents.c.name).where(agents.c.name.in_(names))).scalars())
            connection.execute(agents.update().where(agents.c.name.in_(known)).values(last_seen=now))
            fresh = [{"name": n, "first_seen": now, "last_seen": now} for n in sorted(set(names) - known)]
            if fresh:
                connection.execute(agents.insert(), fresh)

    def list(self) -> list[Sighting]:
        """All of them, by name."""
        with self._database.reading() as connection:
            rows = connection.execute(select(agents).order_by(agents.c.name))
            return [Sighting(row.name, row.first_seen, row.last_seen) for row in rows]
