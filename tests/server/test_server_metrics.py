"""Numbers for Prometheus, scraped while a real run is held, against the ledger's; and the log beside."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedpeft.cli import main
from fedpeft.config.run_file import build_run
from fedpeft.credentials import read_material
from fedpeft.errors import FederationError
from fedpeft.participant.load_simulation import load_simulated_run
from fedpeft.participant.loaded_run import set_loaded_run
from fedpeft.privacy.accountant import epsilon
from fedpeft.privacy.events import ClientLevel
from fedpeft.runtime.telemetry import JsonLines, expose
from fedpeft_client.agent import Agent
from fedpeft_client.agent_metrics import AgentMetrics as AgentMetrics
from fedpeft_client.client_settings import ClientSettings as AgentSettings
from fedpeft_client.status import read_status
from fedpeft_server.ops.daemon import standing
from fedpeft_server.ops.server_settings import read_settings
from fedpeft_server.store import Rules, RunStatus, Store, StoredRun
from fedpeft_server.transport.grpc_event_loop import get_grpc_event_loop
from simulations.soak import Turns
from tests.server.fleet import played, wait_for
from tests.server.store.things import checkpoint, cohort, rows, update
from tests.server.test_supervisor import tables

NAMES = tuple(f"client-{number}" for number in range(4))
ROUNDS, DELTA = 3, 1e-3
Scraped = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def page(address: str) -> str:
    """What a scrape gets."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def samples(text: str) -> Scraped:
    """Every sample by its name and labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(found: Scraped, name: str, **labels: str) -> float:
    """One sample; 0 where there is none yet."""
    return found.get((name, tuple(sorted(labels.items()))), 0.0)


def private_run() -> dict[str, Any]:
    made = tables(weighting="uniform", sampling={"kind": "poisson", "rate": 0.75})
    del made["data"]["limit"]  # which rows it leaves would depend on others
    return made | {
        "run": {"name": "tiny", "rounds": ROUNDS},
        "privacy": {
            "kind": "client-level",
            "clip_norm": 0.5,
            "noise_multiplier": 1.0,
            "target_delta": DELTA,
            "max_epsilon": 100.0,
        },
    }


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """All that server and agents log, as JSON."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonLines())
    logger = logging.getLogger("fedpeft")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield out
    logger.removeHandler(handler)
    logger.setLevel(level)


def call(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert not ended.value.code


@contextmanager
def agents(address: str, keys: Path, homes: Path, watched: AgentMetrics) -> Iterator[None]:
    """Agents with certificates in this process; the first one's numbers are watched."""
    loop = get_grpc_event_loop()

    def made(name: str) -> Agent:
        async def material() -> Any:
            return read_material(keys / "agents" / name, datetime.now(UTC))

        settings = AgentSettings(server=address, data=Path(__file__))
        metrics = watched if name == NAMES[0] else None
        return Agent(
            settings,
            name,
            homes / name,
            material,
            "fedpeft.flower.in_process_app:app",
            turns,
            metrics=metrics,
        )

    async def start() -> list[Agent]:
        return [made(name) for name in NAMES]

    turns = played(_turns())
    running = played(start())
    ends = [asyncio.run_coroutine_threadsafe(agent.run(), loop) for agent in running]
    try:
        yield
    finally:
        for agent in running:
            loop.call_soon_threadsafe(agent.stop)
        for end in ends:
            end.exception(30)


async def _turns() -> Turns:
    return Turns()


def test_a_real_runs_numbers_are_the_ledgers(
    tmp_path: Path, log: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "federation"
    named = [word for name in NAMES for word in ("--agent", name)]
    call("provision", str(keys), "--host", "127.0.0.1", *named)
    call("provision", str(keys), "--agent", "late", "--tokens", "--json")
    (made,) = json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"]
    given = {
        "listen": "127.0.0.1:0",
        "state": tmp_path / "state",
        "tls": {"keys": keys / "server", "authority": keys / "ca"},
        "metrics": {"address": "127.0.0.1:0"},
    }
    own = AgentMetrics()
    with standing(read_settings(None, given)) as (store, supervisor, running):
        where = next(line["text"] for line in lines(log) if "/metrics" in line["text"])
        address = where.removeprefix("metrics on http://").removesuffix("/metrics")
        with agents(running.address, keys, tmp_path / "homes", own):
            supervisor.start()
            run = build_run(private_run(), source="test")
            set_loaded_run(load_simulated_run(run))  # what the agents of this process work with
            stored = supervisor.submit(run, Rules(), submission="one", submitter="me")
            assert supervisor.wait_idle(60.0)
            assert supervisor.get(stored.id).status == RunStatus.FINISHED, supervisor.get(stored.id).reason
            at_work = page(address)
            agent_address, end = expose(own.registry, "127.0.0.1:0")
            agent_page = page(agent_address)
            end()
        wait_for(lambda: of(samples(page(address)), "fedpeft_server_agents_connected") == 0)
        supervisor.drain(10.0)
        check_server(samples(at_work), samples(page(address)), store, stored)
        check_log(lines(log), store, stored)
    check_agent(samples(agent_page), read_status(tmp_path / "homes" / NAMES[0]), store, tmp_path)
    secrets = {made["token"], *private_lines(keys)}
    assert len(secrets) > 10
    for text in (at_work, agent_page, log.getvalue()):
        assert not [secret for secret in secrets if secret in text]


def check_server(found: Scraped, after: Scraped, store: Store, stored: StoredRun) -> None:
    """While agents were there, and once they had left."""
    prefix = "fedpeft_server_"
    ((count, size),) = rows(store, "SELECT count(*), sum(size) FROM updates WHERE counted")
    assert of(found, f"{prefix}results_total", kind="train") == count
    assert of(found, f"{prefix}results_total", kind="query.hello") == len(NAMES)
    assert of(found, f"{prefix}result_bytes_total") == size
    assert of(found, f"{prefix}update_seconds_count") == count
    ((slowest, asked),) = rows(
        store,
        "SELECT sum(accepted_at - opened_at), count(*) FROM updates JOIN rounds ON updates.run = rounds.run"
        " AND updates.round = rounds.number",
    )
    assert asked == count
    assert of(found, f"{prefix}update_seconds_sum") == pytest.approx(slowest, rel=1e-6)
    ((length,),) = rows(store, "SELECT sum(closed_at - opened_at) FROM rounds WHERE number > 0")
    assert of(found, f"{prefix}round_seconds_count") == ROUNDS
    assert of(found, f"{prefix}round_seconds_sum") == pytest.approx(length, rel=1e-6)
    assert of(found, f"{prefix}store_commit_seconds_count") >= 2 * ROUNDS + 4
    assert of(found, f"{prefix}run_round", run=stored.id) == ROUNDS
    spent = epsilon([ClientLevel(noise_multiplier=1.0, sample_rate=0.75)] * ROUNDS, DELTA)
    assert of(found, f"{prefix}run_epsilon", run=stored.id) == pytest.approx(spent, rel=1e-9)
    assert of(found, f"{prefix}runs", status="finished") == 1
    assert of(found, f"{prefix}agents_connected") == len(NAMES)
    assert of(found, f"{prefix}tasks_pending") == of(found, f"{prefix}intake_bytes") == 0
    pushed = of(found, f"{prefix}received_bytes_total", call="PushBlob")
    assert int(str(size)) < pushed < 1.01 * int(str(size)), "every update is beyond what goes inline"
    assert of(found, f"{prefix}sent_bytes_total", call="Session") > 0
    held = [
        value
        for (name, labels), value in after.items()
        if name.endswith("call_seconds_count") and ("call", "Session") in labels
    ]
    assert sum(held) == len(NAMES), "every session has ended"


def check_agent(found: Scraped, status: dict[str, Any], store: Store, folder: Path) -> None:
    """Against what `fedpeft client status` reads, and the server's ledger."""
    prefix = "fedpeft_agent_"
    assert of(found, f"{prefix}connected") == 1
    assert of(found, f"{prefix}results_total") == status["results"]
    assert of(found, f"{prefix}bytes_total", direction="up") == status["bytes_up"]
    assert of(found, f"{prefix}bytes_total", direction="down") == status["bytes_down"] > 0
    assert of(found, f"{prefix}epsilon") == status["epsilon"]
    assert of(found, f"{prefix}task_seconds_count", outcome="done") == status["results"]
    with Store(folder / "state") as again:
        ((count, size),) = rows(again, "SELECT count(*), sum(size) FROM updates WHERE agent = 'client-0'")
    assert status["results"] == int(str(count)) + 1, "and its greeting"
    assert status["bytes_up"] > int(str(size))


def lines(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def check_log(found: list[dict[str, Any]], store: Store, stored: StoredRun) -> None:
    """What programs read of it is what the ledger has."""
    events = Counter(line["event"] for line in found if "event" in line)
    assert events["round"] == ROUNDS + 1, "and the start"
    assert events["left"] == len(NAMES)
    assert events["connected"] == 2 * len(NAMES), "at both ends"
    closed = {line["round"]: line for line in found if line.get("event") == "round"}
    for number, text in rows(store, "SELECT number, row FROM rounds ORDER BY number"):
        row, line = json.loads(str(text)), closed[number]
        assert (line["run"], line["epsilon"]) == (stored.id, row["epsilon"])
        assert line["bytes_up"] == sum(outcome["bytes_up"] for outcome in row["outcomes"])
        assert line["counted"] == sum(outcome["status"] == "folded" for outcome in row["outcomes"])
    for line in found:
        assert datetime.fromisoformat(line["time"]).tzinfo == UTC
        assert line["level"] in ("debug", "info", "warning", "error")


def private_lines(folder: Path) -> set[str]:
    """Lines of every private key of a federation."""
    keys = [path for path in folder.rglob("*.pem") if "PRIVATE KEY" in path.read_text()]
    found = {line for path in keys for line in path.read_text().splitlines() if len(line) > 20}
    return {line for line in found if "PRIVATE" not in line}


def test_what_the_ledger_refuses_is_counted_by_reason(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        run = build_run({"run": {"name": "small", "rounds": 3}}, source="test")
        stored = store.runs.submit(run, Rules(), submission="one", submitter="me")
        store.rounds(stored).open_round(1, cohort)
        first = update(stored, 1, "ann")
        store.results.accept([first, update(stored, 1, "ann", b"other"), update(stored, 2, "bob")])
        store.results.accept([first])
        store.rounds(stored).commit(checkpoint(stored, 1))
        store.results.accept([update(stored, 1, "eve")])
        read = store.metrics.registry.get_sample_value
        assert read("fedpeft_server_results_total", {"kind": "train"}) == 1, "a repetition is none more"
        for reason, count in store.runs.refusals(stored.id).items():
            assert read("fedpeft_server_results_refused_total", {"reason": reason}) == count
        assert store.runs.refusals(stored.id) == {"different-result": 1, "round-closed": 2}


def test_an_address_in_use_says_so() -> None:
    address, end = expose(AgentMetrics().registry, "127.0.0.1:0")
    with pytest.raises(FederationError, match="cannot be listened on"):
        expose(AgentMetrics().registry, address)
    end()
