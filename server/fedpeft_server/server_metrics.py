"""What Prometheus is told of a server: counters that its rooms move, and what a scrape reads off.

One registry per server, never the process's own. Labels have few values by construction: runs apart, none
comes from what a peer says, so that nobody can fill the memory of whoever stores the series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from fedpeft.errors import FedPEFTError

PREFIX = "fedpeft_server_"
# Seconds. A commit takes milliseconds unless the disk is slow; a round from a tenth of a second to a day.
_COMMIT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_CALL_S = (0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 600.0)
_ROUND_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0, 100_000.0)


class ServerMetrics:
    """A server's; every method may be called on any thread, whether anyone scrapes or not."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.commits = self._histogram(
            "store_commit_seconds", "Transactions that write, waiting for the lock included", _COMMIT_S
        )
        self._results = self._counter("results_total", "Results made durable and acknowledged", "kind")
        self._result_bytes = self._counter("result_bytes_total", "Bytes of accepted training results")
        self._verdicts = self._counter("results_refused_total", "Results that the ledger refused", "reason")
        self._updates = self._histogram(
            "update_seconds", "From a round's opening to the acceptance of an update", _ROUND_S
        )
        self._rounds = self._histogram("round_seconds", "From a round's opening to its commit", _ROUND_S)
        self._received = self._counter("received_bytes_total", "Bytes of messages from peers", "call")
        self._sent = self._counter("sent_bytes_total", "Bytes of messages to peers", "call")
        self._calls = self._histogram("call_seconds", "Calls from beginning to end", _CALL_S, "call", "code")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(PREFIX + name, text, labels, registry=self.registry, buckets=buckets)

    def count_accepted(self, kind: str, size: int, waited_s: float | None) -> None:
        """A result is durable; `waited_s` since its round was opened, None for greetings."""
        self._results.labels(kind).inc()
        if waited_s is not None:
            self._result_bytes.inc(size)
            self._updates.observe(max(0.0, waited_s))

    def count_refused(self, reason: str) -> None:
        """The ledger refused a result; `reason` is one of its short names."""
        self._verdicts.labels(reason).inc()

    def count_committed_round(self, seconds: float) -> None:
        """A round was committed, so many seconds after it was opened."""
        self._rounds.observe(max(0.0, seconds))

    def count_received(self, call: str, size: int) -> None:
        """A message came."""
        self._received.labels(call).inc(size)

    def count_sent(self, call: str, size: int) -> None:
        """A message went."""
        self._sent.labels(call).inc(size)

    def count_call(self, call: str, code: str, seconds: float) -> None:
        """A call has ended; `code` is gRPC's name in small letters."""
        self._calls.labels(call, code).observe(seconds)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read at every scrape; `read` must be safe on any thread."""
        Gauge(PREFIX + name, text, registry=self.registry).set_function(read)

    def watch_refusals(self, totals: Callable[[], Mapping[str, int]]) -> None:
        """What the transport refused since the start, by reason, read at every scrape."""
        self.registry.register(_Refusals(totals))

    def watch_ledger(self, ledger: Ledger) -> None:
        """What the store says of runs, read at every scrape."""
        self.registry.register(_Runs(ledger))


class _Refusals(Collector):
    def __init__(self, totals: Callable[[], Mapping[str, int]]) -> None:
        self._totals = totals

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked for when this is registered."""
        return []

    def collect(self) -> Iterable[Metric]:
        """One series for each reason that was met."""
        family = CounterMetricFamily(
            PREFIX + "refusals", "Calls, messages and results refused", labels=["reason"]
        )
        for reason, count in self._totals().items():
            family.add_metric([reason], count)
        yield family


@dataclass(frozen=True)
class RunGauges:
    """One run at a scrape; `round` is the last committed one, `epsilon` None where nothing was spent."""

    run: str
    round: int
    epsilon: float | None


class Ledger(Protocol):
    """Where a scrape learns of runs."""

    def gauges(self, newest: int) -> tuple[Mapping[str, int], Sequence[RunGauges]]:
        """How many runs stand how, and the newest ones.

        Raises:
            StorageError: the store cannot be read.
        """
        ...


class _Runs(Collector):
    """Gauges of runs; a store that cannot be read leaves them out rather than failing the scrape."""

    NEWEST = 20  # so that the number of series doesn't grow with that of runs

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked of the store when this is registered."""
        return []

    def collect(self) -> Iterable[Metric]:
        """See the class."""
        try:
            standing, newest = self._ledger.gauges(self.NEWEST)
        except FedPEFTError:
            return
        runs = GaugeMetricFamily(PREFIX + "runs", "Runs by how they stand", labels=["status"])
        for status, count in standing.items():
            runs.add_metric([status], count)
        rounds = GaugeMetricFamily(PREFIX + "run_round", "Last committed round", labels=["run"])
        epsilon = GaugeMetricFamily(PREFIX + "run_epsilon", "Epsilon spent so far", labels=["run"])
        for one in newest:
            rounds.add_metric([one.run], one.round)
            if one.epsilon is not None:
                epsilon.add_metric([one.run], one.epsilon)
        yield from (runs, rounds, epsilon)
