"""The run files on the real data: what a reader of SOURCES.md can count by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpeft.config.run_file import load_run
from fedpeft.config.sections import RunConfig
from fedpeft.data.run_tables import read_tables
from fedpeft.data.tables import RawFederated
from tests.data.loading import load_federated

SIMULATIONS = Path(__file__).resolve().parents[2] / "simulations"


def tables(name: str) -> tuple[RunConfig, RawFederated]:
    run = load_run(SIMULATIONS / f"{name}.toml")
    return run, read_tables(run.data, run.model.task, run.run.seed)


def sizes(raw: RawFederated) -> dict[str, int]:
    return {client.name: len(client.train) + len(client.heldout) for client in raw.clients}


def test_dolly_has_its_published_clients_and_test_set(shared_dir: Path) -> None:
    _, raw = tables("dolly_stories260k")
    counts = [1820, 2831, 1773, 1299, 2253, 565, 1518, 896, 1533, 443]
    assert sizes(raw) == {str(client): count for client, count in enumerate(counts)}
    assert raw.test is not None
    assert len(raw.test) == 80
    assert raw.unused_rows == 80


def test_shakespeare_has_a_client_per_role(shared_dir: Path) -> None:
    _, raw = tables("shakespeare_stories260k")
    assert len(raw.clients) == 64
    assert sizes(raw)["GLOUCESTER"] == 211
    assert raw.unused_clients == 299 - 64
    assert len(raw.rows) + raw.unused_rows == 7095


def test_t0_has_a_client_per_file(shared_dir: Path) -> None:
    _, raw = tables("t0_stories260k")
    assert set(sizes(raw).values()) == {200}
    assert sorted(sizes(raw)) == sorted(
        path.stem for path in (shared_dir / "data" / "t0_tasks").glob("*.jsonl")
    )
    assert len(raw.clients) == 20


def test_trec_has_six_classes_in_the_published_order(shared_dir: Path) -> None:
    _, raw = tables("trec_minilm")
    assert raw.label_names == ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
    assert len(raw.clients) == 10
    assert sum(sizes(raw).values()) == 5452
    assert min(sizes(raw).values()) >= 20
    assert raw.test is not None
    assert len(raw.test) == 500


def test_stories_tokens_read_back_as_the_text(shared_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(shared_dir / "models" / "stories260K")
    run = load_run(SIMULATIONS / "dolly_stories260k.toml", ["data.limit=300", "data.max_length=2048"])
    data = load_federated(run.data, task=run.model.task, tokenizer=tokenizer, seed=0)
    raw = read_tables(run.data, run.model.task, 0)
    for index in range(0, len(data.rows), 7):
        assert tokenizer.decode(data.rows.prompt(index)[1:]) == raw.rows.prompts[index]


@pytest.mark.parametrize("path", sorted(SIMULATIONS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_run_file_says_its_question_and_its_command(path: Path) -> None:
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert "Question:" in head
    assert f"fedpeft simulate simulations/{path.name}" in head
