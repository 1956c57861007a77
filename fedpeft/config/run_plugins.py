"""Which plugins a run uses, and whether several ends use the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from fedpeft.config.sections import RunConfig
from fedpeft.plugins import Plugin, plugin_of

ON_DEVICES = ("stages", "strategies", "lora_rules", "peft_methods", "tasks")
"""Groups whose entries a device needs as well as its server; the others serve one end."""


def plugins_of(run: RunConfig, *, devices_only: bool = True) -> tuple[Plugin, ...]:
    """Return the installed distributions whose entries a run names, sorted; nothing of them is imported.

    Args:
        devices_only: without those that serve one end only (metrics, sinks, attacks).
    """
    named = {
        plugin_of(group, name)
        for group, name in _iterate_named(run)
        if group in ON_DEVICES or not devices_only
    }
    return tuple(sorted(plugin for plugin in named if plugin is not None))


def _iterate_named(run: RunConfig) -> Iterator[tuple[str, str]]:
    """Group and name of every entry that a run file chooses."""
    federation = run.federation
    yield from (("stages", stage.kind) for stage in run.stages)
    if run.downlink is not None:
        yield "stages", run.downlink.kind
    yield "strategies", federation.strategy.kind
    if federation.lora_rule is not None:
        yield "lora_rules", federation.lora_rule
    yield "peft_methods", run.peft.method
    yield "tasks", run.model.task
    yield from (("metrics", name) for name in run.evaluation.metrics)
    yield from (("sinks", name) for name in run.output.sinks)
    if federation.attack is not None:
        yield "attacks", federation.attack.kind


def plugins_text(plugins: Sequence[Plugin]) -> str:
    """Return plugins as text for messages; empty without any."""
    return json.dumps([[item.name, item.version, item.digest] for item in plugins]) if plugins else ""


def difference(ours: str, theirs: str) -> str:
    """Return in a few words how two ends' plugins differ, given as `plugins_text`; empty if they don't.

    What can't be read is another plugin.
    """
    if ours == theirs:
        return ""
    return f"it has {_show(theirs)}, and this end {_show(ours)}"


def _show(text: str) -> str:
    try:
        items = json.loads(text) if text else []
        return ", ".join(str(Plugin(*map(str, item))) for item in items[:4]) or "no plugin"
    except (ValueError, TypeError, RecursionError):
        return "what can't be read"
