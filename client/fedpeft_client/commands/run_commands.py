"""`fedpeft run submit | list | show | logs | stop | pull | remove`: runs on a server, from anywhere."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedpeft.config.deployment import clients_named, find_ignored_keys
from fedpeft.config.run_file import load_run, run_toml
from fedpeft.config.sections import RunConfig
from fedpeft.errors import StateError
from fedpeft.ledger.records import Baseline, Finished, Round, Started, parse_row
from fedpeft.ledger.run_place import holds_run
from fedpeft.reporting import event_lines
from fedpeft.reporting.text import count_noun, metric_name, metric_value, printable
from fedpeft.v1 import federation_pb2 as pb
from fedpeft_client.transport.admin_client import AdminClient, new_submission, run_and_answer

Rules = pb.CohortRules


def submit_command(
    desk: AdminClient,
    run_file: Path,
    overrides: Sequence[str],
    rules: Rules,
    readers: Sequence[str],
    *,
    as_json: bool,
) -> None:
    """Queue a run and print its id. The server, whose versions count, says what it would refuse.

    Args:
        readers: submitters who may read the run too; "*": all of them.

    Raises:
        RunFileError: every problem of the run file.
        FedPEFTError: what the server answered.
    """
    run = load_run(run_file, overrides)
    request = pb.SubmitRunRequest(
        run_toml=run_toml(run), cohort=rules, submission=new_submission(), readers=readers
    )
    if not as_json:
        print(f"{run_file} is being checked by the server", file=sys.stderr)
    info = run_and_answer(desk.call(lambda stub: stub.SubmitRun(request)))
    if as_json:
        print(json.dumps(info_table(info)))
        return
    print(printable(f"{info.id}  {info.status}"))
    for line in _expectations(run, rules):
        print(f"  {line}")


def _expectations(run: RunConfig, rules: Rules) -> Iterator[str]:
    """Say what a run waits for, and what of its file plays no part."""
    wanted = rules.min_agents or len(rules.agents) or clients_named(run)
    said = rules.min_agents or rules.agents
    source = "" if said else ", as many as the run file has clients; --min-agents N begins with fewer"
    verb = "is" if wanted == 1 else "are"
    yield f"begins when {count_noun(wanted, 'agent')} {verb} connected{source}"
    if rules.agents:
        yield printable(f"only these are asked: {', '.join(rules.agents)}")
    yield from (f"{key} plays no part: {why}" for key, why in find_ignored_keys(run).items())


def list_command(desk: AdminClient, *, limit: int, as_json: bool) -> None:
    """Print the runs that the caller may read, the newest first."""
    reply = run_and_answer(desk.call(lambda stub: stub.ListRuns(pb.ListRunsRequest(limit=limit))))
    if as_json:
        print(json.dumps([info_table(info) for info in reply.runs]))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("run", "status", "round", "changed", "submitter", "detail"):
        table.add_column(column, no_wrap=column != "detail")
    for info in reply.runs:
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.updated_ms / 1000))
        where = f"{info.round}/{info.rounds}"
        whose, detail = Text(printable(info.submitter)), Text(printable(info.detail))
        table.add_row(info.id, info.status, where, changed, whose, detail)
    Console(file=sys.stdout, highlight=False).print(table)


def show_command(desk: AdminClient, run_id: str, *, as_json: bool) -> None:
    """Print how a run stands."""
    _show(run_and_answer(desk.call(lambda stub: stub.ShowRun(pb.RunRequest(id=run_id)))), as_json=as_json)


def stop_command(desk: AdminClient, run_id: str, reason: str, *, as_json: bool) -> None:
    """End a run; what it has reached can be pulled."""
    request = pb.StopRunRequest(id=run_id, reason=reason)
    _show(run_and_answer(desk.call(lambda stub: stub.StopRun(request))), as_json=as_json)


def remove_command(desk: AdminClient, run_id: str, *, as_json: bool) -> None:
    """Delete what an ended run keeps on the server's disk."""
    _show(run_and_answer(desk.call(lambda stub: stub.RemoveRun(pb.RunRequest(id=run_id)))), as_json=as_json)


def logs_command(desk: AdminClient, run_id: str, *, follow: bool, as_json: bool) -> None:
    """Print a run's log; when followed, until the run has ended."""

    async def shown() -> None:
        primary, rounds = "", 0
        async for line in desk.lines(run_id, follow=follow):
            if as_json:
                print(line.json, flush=True)
                continue
            row = json.loads(line.json)
            primary, rounds = row.get("primary_metric", primary), row.get("rounds", rounds)
            at = time.strftime("%H:%M:%S", time.localtime(line.time_ms / 1000))
            print(f"{at}  {printable(_line_text(line.json, row, primary, rounds))}", flush=True)

    asyncio.run(shown())


def pull_command(desk: AdminClient, run_id: str, out: Path, *, force: bool, as_json: bool) -> None:
    """Write a run's adapter, report and rows to a folder: the last ones that there are.

    Raises:
        StateError: `out` is in the way.
        FedPEFTError: what the server answered.
    """
    if out.exists() and not force:
        raise StateError(f"--out {out} is there already; replace it with --force, or choose another name")
    if out.exists() and not (out.is_dir() and (holds_run(out) or not any(out.iterdir()))):
        raise StateError(f"--out {out} is no run's folder, and --force replaces nothing else; choose another")
    pulled = run_and_answer(desk.pull(run_id, out))
    names, unfinished = list(pulled.names), pulled.unfinished
    if as_json:
        reached = {} if unfinished is None else {"round": unfinished.round, "rounds": unfinished.rounds}
        print(json.dumps({"out": str(out), "files": names, "ended": unfinished is None, **reached}))
        return
    print(f"{out}: {len(names)} files")
    if unfinished is not None:
        print(f"as of    round {unfinished.round} of {unfinished.rounds}, not final: the run goes on")
    for label, name in (("adapter", "adapter"), ("report", "report.html")):
        if (out / name).exists():
            print(f"{label:<8} {out / name}")


def info_table(info: pb.RunInfo) -> Mapping[str, Any]:
    """A run's standing as plain values."""
    table: dict[str, Any] = {
        "id": info.id,
        "name": info.name,
        "digest": info.digest,
        "status": info.status,
        "detail": info.detail,
        "round": info.round,
        "rounds": info.rounds,
        "agents": list(info.agents),
        "submitted": info.submitted_ms / 1000,
        "changed": info.updated_ms / 1000,
        "metrics": dict(info.metrics),
        "adapter_digest": info.adapter_digest or None,
        "submitter": info.submitter,
        "readers": list(info.readers),
        "incomplete": [{"name": m.name, "counted": m.counted, "asked": m.asked} for m in info.incomplete],
    }
    spent = {key: getattr(info, key) for key in ("epsilon", "epsilon_cohort") if info.HasField(key)}
    return table | spent


def _show(info: pb.RunInfo, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(info_table(info)))
        return
    for label, text in _facts(info):
        print(f"{label:<9} {printable(text)}")


def _facts(info: pb.RunInfo) -> list[tuple[str, str]]:
    status = info.status + (f": {printable(info.detail)}" if info.detail else "")
    facts = [
        ("run", info.id),
        ("submitter", printable(info.submitter) + _format_shared(info.readers)),
        ("status", status),
        ("round", f"{info.round} of {info.rounds}"),
        ("agents", ", ".join(map(printable, info.agents)) or "none yet"),
        *((metric_name(name), metric_value(name, value)) for name, value in sorted(info.metrics.items())),
        ("run file", info.digest[:12]),
    ]
    facts.extend(
        ("", f"{printable(member.name)}: {member.counted} of {member.asked} rounds counted")
        for member in info.incomplete
    )
    if info.HasField("epsilon"):
        facts.append(("epsilon", f"{info.epsilon:.3g}"))
    if info.HasField("epsilon_cohort"):
        facts.append(("", f"{info.epsilon_cohort:.3g} against who sees whom rounds ask (sampling rate 1)"))
    if info.adapter_digest:
        facts.append(("adapter", info.adapter_digest[:12]))
    return facts


def _format_shared(readers: Sequence[str]) -> str:
    named = ", ".join("every submitter" if reader == "*" else printable(reader) for reader in readers)
    return f"; also read by {named}" if named else ""


def _line_text(text: str, row: Mapping[str, Any], primary: str, rounds: int) -> str:
    """A log line for people."""
    if row.get("event") == "status":
        return f"{row['status']}: {printable(row['reason'])}" if row["reason"] else str(row["status"])
    if "text" in row:
        return printable(str(row["text"]))
    known = parse_row(text)
    if isinstance(known, Started):
        return event_lines.format_start(known)
    if isinstance(known, Round):
        return event_lines.round_line(known, rounds, primary)
    if isinstance(known, Baseline):
        return event_lines.baseline_line(known, primary)
    return event_lines.format_end(known) if isinstance(known, Finished) else text
