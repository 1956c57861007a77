"""The report of a run: one HTML file that needs nothing else, for a person to open, print or send."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fedpeft.ledger.records import Round, Row
from fedpeft.reporting import charts, text
from fedpeft.reporting.aggregation_error import aggregation_charts
from fedpeft.reporting.clients import client_charts, client_rows
from fedpeft.reporting.event_lines import attackers_text, clients_text, trouble_line
from fedpeft.reporting.privacy_statement import privacy_charts, privacy_statement
from fedpeft.reporting.scalars import scalar_charts
from fedpeft.reporting.snippet import load_snippet
from fedpeft.reporting.staleness_chart import rounds_fact, staleness_charts
from fedpeft.reporting.summary import (
    Summary,
    build_summary,
    higher_is_better,
    metrics_of,
    rounds_in_order,
    spread_of,
)
from fedpeft.reporting.summary_table import interval
from fedpeft.reporting.transfers import traffic_stats_of
from fedpeft.reporting.verdict import verdict
from fedpeft.runtime.files import write_atomically

_MOST_MESSAGES = 50  # notes and troubles shown; the rest is counted


def write_report(folder: Path, run_toml: str, rows: Sequence[Row], snippet: str | None = None) -> Path:
    """Write `report.html` into a run's folder, in place of an older one, in one step.

    Equal rows give equal bytes, but for the fields named `wall_s`.

    Args:
        folder: the run's folder; it exists.
        run_toml: the resolved run file, shown as it is.
        rows: the run so far; a `started` row is needed, all others may be absent.
        snippet: Python that loads the adapter; default `load_snippet` of the run file.

    Raises:
        StateError: there is no `started` row.
        StorageError: the file cannot be written.
    """
    page = render_report(run_toml, rows, snippet)
    path = folder / "report.html"
    write_atomically(path, page.encode("utf-8", errors="replace"))
    return path


def render_report(run_toml: str, rows: Sequence[Row], snippet: str | None = None) -> str:
    """The page as text; see `write_report`."""
    summary, rounds, run = build_summary(rows), rounds_in_order(rows), _tables(run_toml)
    clients = client_rows(summary, rows)
    package = files("fedpeft.reporting")
    # Everything is escaped but what is marked: our own drawings and style sheet.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        value=text.metric_value,
        interval=interval,
        metric_name=text.metric_name,
        size=text.byte_size,
        duration=text.duration,
        counted=text.count_noun,
        printable=text.printable,
        arrow=lambda metric: text.direction(higher_is_better(summary.started, metric)),
        clients_text=clients_text,
        leg_of=traffic_stats_of,
        lossy=[journey.direction for journey in summary.journeys if journey.cosine is not None],
        drawing=lambda chart: Markup(chart.svg),
    )
    template = environment.from_string((package / "report.html").read_text(encoding="utf-8"))
    return template.render(
        style=Markup((package / "report.css").read_text(encoding="utf-8")),
        summary=summary,
        started=summary.started,
        verdict=verdict(summary),
        metrics=metrics_of(summary),
        spreads=_spreads(summary, rounds),
        rounds=rounds,
        clients=clients,
        privacy=privacy_statement(summary),
        sections=_sections(summary, rounds, clients),
        messages=_messages(rounds),
        facts=_facts(summary, run),
        run_toml=run_toml,
        snippet=load_snippet(run) if snippet is None else snippet,
    )


def _sections(
    summary: Summary, rounds: Sequence[Round], clients: Sequence[Any]
) -> list[tuple[str, list[charts.Chart]]]:
    """The charts under their headings; empty groups are left out."""
    during = [
        *charts.training_charts(rounds),
        *charts.outcome_charts(rounds),
        *staleness_charts(summary, rounds),
    ]
    groups = [
        ("On the global test set", charts.curve_charts(summary, rounds)),
        (
            "On the clients",
            [*client_charts(summary, clients), *charts.spread_charts(summary, rounds), *during],
        ),
        ("Privacy budget", privacy_charts(summary, rounds)),
        ("Scalars", scalar_charts(rounds)),
        ("LoRA factors", aggregation_charts(rounds)),
        ("Bytes", charts.traffic_charts(rounds)),
    ]
    return [(title, group) for title, group in groups if group]


def _spreads(summary: Summary, rounds: Sequence[Round]) -> list[tuple[str, Any]]:
    """The federated model's spread over the clients at the end, per metric."""
    last = next((row for row in reversed(rounds) if row.evaluation and row.round > 0), None)
    if last is None:
        return []
    found = [(name, spread_of(last.evaluation, summary.started, name)) for name in metrics_of(summary)]
    return [(name, spread) for name, spread in found if spread is not None]


def _messages(rounds: Sequence[Round]) -> list[str]:
    """Notes, and clients that failed or were refused, by round."""
    messages = []
    for row in rounds:
        troubles = [line for item in row.outcomes if (line := trouble_line(item))]
        messages += [f"round {row.round}: {text.printable(line)}" for line in (*row.notes, *troubles)]
    if len(messages) > _MOST_MESSAGES:
        rest = len(messages) - _MOST_MESSAGES
        return [*messages[:_MOST_MESSAGES], f"and {rest:,} more in metrics.jsonl"]
    return messages


def _facts(summary: Summary, run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the run was, as label and value."""
    started, finished = summary.started, summary.finished
    share = 100 * started.trainable_parameters / started.total_parameters if started.total_parameters else 0.0
    stages = " → ".join(str(stage.get("kind", "?")) for stage in run.get("stages", ()))
    privacy = run.get("privacy", {}).get("kind", "none")
    facts = [
        ("Base model", str(run.get("model", {}).get("path", ""))),
        ("PEFT method", str(run.get("peft", {}).get("method", ""))),
        (
            "Trained parameters",
            f"{started.trainable_parameters:,} of {started.total_parameters:,} ({share:.2g}%)",
        ),
        ("Strategy", _strategy(run)),
        ("Hostile clients", text.printable(attackers_text(started))),
        ("LoRA rule", str(run.get("federation", {}).get("lora_rule", ""))),
        ("Groups of clients", _groups(run)),
        ("Rounds", rounds_fact(run)),
        ("Stages", stages or "none"),
        ("Stage of the way down", str(run.get("downlink", {}).get("kind", "none"))),
        ("Differential privacy", str(privacy)),
        (
            "Training rows",
            f"{'not told' if started.privacy else f'{sum(started.clients.values()):,}'} over"
            f" {text.count_noun(len(started.clients), 'client')}",
        ),
        ("Rows cut to the length limit", "" if started.privacy else f"{started.cut_rows:,}"),
        ("Global test rows", f"{started.test_examples:,}"),
        ("Engine", started.engine),
        ("Device", "" if started.device == "cpu" else started.device),
        ("Seed", str(started.seed)),
        ("Run digest", started.run_digest),
        ("Base digest", started.base_digest),
        ("Adapter digest", finished.adapter_digest if finished else ""),
        ("Peak memory", f"{finished.peak_rss_mib:,.0f} MiB" if finished and finished.peak_rss_mib else ""),
        (
            "Peak memory of the device",
            f"{finished.peak_device_mib:,.0f} MiB" if finished and finished.peak_device_mib else "",
        ),
        ("Wall time", text.duration(summary.wall_s) + ("" if finished else " so far")),
    ]
    return [(label, value) for label, value in facts if value]


def _strategy(run: Mapping[str, Any]) -> str:
    """Its name and options."""
    section = dict(run.get("federation", {}).get("strategy", {}))
    options = ", ".join(f"{key} {value}" for key, value in section.items() if key != "kind")
    return text.printable(f"{section.get('kind', '')}{f' ({options})' if options else ''}")


def _groups(run: Mapping[str, Any]) -> str:
    """How clients differ, in a few words each."""
    parts = []
    for group in run.get("groups", ()):
        keys = [
            f"{key} {value}"
            for section in ("model", "peft", "training")
            for key, value in group.get(section, {}).items()
        ]
        if group.get("trains"):
            keys.append(f"trains {', '.join(map(str, group['trains']))}")
        own = ", ".join(keys) or "as all"
        parts.append(f"{text.count_noun(len(group.get('clients', ())), 'client')}: {text.printable(own)}")
    return "; ".join(parts)


def _tables(run_toml: str) -> dict[str, Any]:
    """The run file as tables; one that cannot be read is only shown, not explained."""
    try:
        return tomllib.loads(run_toml)
    except tomllib.TOMLDecodeError:
        return {}
