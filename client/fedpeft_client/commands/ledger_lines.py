"""The ledger of what left a device, as lines for its owner."""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

COUNTS = ("examples", "steps")  # metrics that count rows, or follow from how many there are
_SHOWN = ("run", "round", "kind", "failure", "refusal", "values", "metrics", "weight")


def ledger_lines(entries: Iterable[Mapping[str, Any]], last: int) -> Iterator[str]:
    """Sums by kind of message and by name, then the last messages one by one."""
    messages: Counter[str] = Counter()
    bytes_: Counter[str] = Counter()
    names: Counter[str] = Counter()
    tail: deque[Mapping[str, Any]] = deque(maxlen=last)
    for entry in entries:
        what = str(entry.get("what", ""))
        messages[what] += int(entry.get("messages", 1))
        bytes_[what] += int(entry.get("bytes", 0))
        names.update(_names(entry))
        tail.append(entry)
    yield f"{sum(messages.values())} messages of {sum(bytes_.values())} bytes left this device"
    for what, count in sorted(messages.items()):
        yield f"  {what:<10} {count:>8} messages {bytes_[what]:>14} bytes"
    for name, count in sorted(names.items()):
        yield f"  {name:<32} {count:>8} times"
    for entry in tail:
        shown = {key: entry[key] for key in _SHOWN if entry.get(key) not in (None, {}, "")}
        # As JSON: names of runs come from a server and may hold anything.
        head = f"{entry.get('time', '')}  {entry.get('what', '')}  {entry.get('bytes', 0)} bytes"
        yield f"{head}  {json.dumps(shown)}" if shown else head


def _names(entry: Mapping[str, Any]) -> Iterator[str]:
    """What a message told by name."""
    metrics, values = entry.get("metrics") or {}, entry.get("values") or {}
    for name in metrics:
        yield f"{'count' if name in COUNTS else 'metric'} {json.dumps(name)[1:-1]}"
    if entry.get("weight") is not None:
        yield "count weight"
    for name in values:
        yield f"value {json.dumps(name)[1:-1]}"
    for name in entry.get("capabilities") or {}:
        yield f"capability {json.dumps(name)[1:-1]}"
