"""Which numbers beside an update may leave a device: its owner's word, in the node's own configuration.

An agent puts it there from its policy. Flower's own nodes take the same two keys:
``flower-supernode --node-config 'metrics="loss" min-count=10'``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from flwr.app import UserConfig

METRICS, MIN_COUNT = "metrics", "min-count"
LOG = logging.getLogger("fedpeft.client")


@dataclass(frozen=True)
class Disclosure:
    """What may be told.

    Attributes:
        metrics: by name; None: all.
        min_count: a number of rows below it is not told, nor one that follows from it.
    """

    metrics: frozenset[str] | None = None
    min_count: int = 1

    @classmethod
    def of_node(cls, config: UserConfig) -> Disclosure:
        """As a node's configuration says; what it leaves out is not restricted."""
        names = config.get(METRICS)
        told = None if names is None else frozenset(str(names).split(",")) - {""}
        return cls(told, int(config.get(MIN_COUNT, 1)))

    def to_config(self) -> UserConfig:
        """Inverse of `of_node`."""
        named: UserConfig = {} if self.metrics is None else {METRICS: ",".join(sorted(self.metrics))}
        return {**named, MIN_COUNT: self.min_count}

    def count(self, rows: int) -> int:
        """A number of rows as it may be told; 0 where it may not."""
        return rows if rows >= self.min_count else 0

    def select(self, metrics: Mapping[str, float], counts: Collection[str], rows: int) -> dict[str, float]:
        """The metrics that may be told.

        Args:
            counts: names of those that are numbers of rows, or follow from `rows`.
            rows: that the client trains on.
        """
        told = {
            name: value
            for name, value in metrics.items()
            if (self.metrics is None or name in self.metrics)
            and not (name in counts and rows < self.min_count)
        }
        if withheld := sorted(metrics.keys() - told.keys()):
            LOG.info("withheld from the server: %s", ", ".join(withheld))
        return told
