"""What Prometheus is told of an agent: what `fedpeft client status` shows, and how long tasks take.

Counts are those of the agent's whole life, since they are durable; no label has a value that a server chose.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from fedpeft_client.status import AgentStatusFile

PREFIX = "fedpeft_agent_"
_TASK_S = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0)


class AgentMetrics:
    """An agent's registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._tasks = Histogram(
            PREFIX + "task_seconds",
            "Tasks from their turn to their result or refusal",
            ["outcome"],
            registry=self.registry,
            buckets=_TASK_S,
        )

    def task(self, outcome: str, seconds: float) -> None:
        """A task has had its turn: it was done, refused, failed, or withdrawn meanwhile."""
        self._tasks.labels(outcome).observe(seconds)

    def watch(self, status: AgentStatusFile) -> None:
        """What the status says, read at every scrape."""
        self.registry.register(_Life(status))


class _Life(Collector):
    def __init__(self, status: AgentStatusFile) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked for when this is registered."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The counts that an agent keeps on its disk, and how it stands."""
        usage, status = self._status.usage, self._status
        yield _gauge("connected", "Whether there is a session with the server", status.state == "connected")
        yield _gauge("working", "Whether a task has its turn", bool(status.doing))
        yield _gauge("epsilon", "Epsilon of all runs, by the device's own account", status.epsilon)
        yield _counter("model_loads", "Times that a base model was loaded since the start", status.loads)
        yield _counter("results", "Results that the server acknowledged", usage.results)
        yield _counter("refusals", "Tasks that the owner's policy refused", usage.refusals)
        yield _counter("failures", "Tasks that came to nothing", usage.failures)
        moved = CounterMetricFamily(PREFIX + "bytes", "Bytes of tasks and results", labels=["direction"])
        moved.add_metric(["up"], usage.bytes_up)
        moved.add_metric(["down"], usage.bytes_down)
        yield moved


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)
