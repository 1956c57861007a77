"""Bad input: one line with cause and remedy, the right exit code, nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedpeft.cli import main

Tables = dict[str, Any]
Attempt = Callable[..., tuple[int, str]]


@pytest.fixture
def attempt(
    tables: Tables, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run `fedpeft simulate` on the tiny run, changed; returns exit code and what stderr says."""

    def run(change: Callable[[Tables], object] = lambda tables: None, *arguments: str) -> tuple[int, str]:
        change(tables)
        run_file = tmp_path / "run.toml"
        run_file.write_text(tomli_w.dumps(tables))
        with pytest.raises(SystemExit) as stopped:
            main(
                [
                    "simulate",
                    str(run_file),
                    "--out",
                    str(tmp_path / "out"),
                    "--quiet",
                    "--workers",
                    "1",
                    *arguments,
                ]
            )
        return int(stopped.value.code or 0), capsys.readouterr().err

    return run


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def good_rows(count: int = 40) -> list[dict[str, Any]]:
    return [
        {"prompt": f"say {i}\n", "answer": str(i), "who": f"c{i % 4}", "label": i % 2} for i in range(count)
    ]


def from_file(tables: Tables, path: str, **more: Any) -> None:
    tables["data"] = {
        "train": path,
        "prompt": "{prompt}",
        "answer": "{answer}",
        "max_length": 64,
        "partitioner": {"kind": "iid", "clients": 4},
    } | more


def test_all_errors_of_a_run_file_come_at_once(attempt: Attempt) -> None:
    def change(tables: Tables) -> None:
        tables["run"]["rounds"] = "many"
        tables["run"]["sede"] = 1
        tables["training"]["lr"] = -1

    code, said = attempt(change)
    assert code == 3
    assert len(said.splitlines()) == 3
    assert "run.rounds" in said
    assert "run.sede: unknown key" in said
    assert "training.lr" in said


def test_names_that_no_table_knows_come_at_once(attempt: Attempt) -> None:
    def change(tables: Tables) -> None:
        tables["peft"]["method"] = "lorra"
        tables["peft"].pop("r")
        tables["peft"].pop("lora_dropout")
        tables["training"]["optimizer"] = "adamww"
        tables["federation"] = {"strategy": "fedavgg"}
        tables["stages"] = [{"kind": "clipp"}]
        tables["evaluation"]["metrics"] = ["exact"]

    code, said = attempt(change)
    assert code == 3
    assert len(said.splitlines()) == 5
    for meant in ("lora", "adamw", "fedavg", "clip", "exact-match"):
        assert meant in said


def test_unknown_peft_option(attempt: Attempt) -> None:
    code, said = attempt(lambda tables: tables["peft"].update(lora_alhpa=3))
    assert code == 3
    assert "lora_alpha" in said


def test_target_module_that_the_model_lacks(attempt: Attempt) -> None:
    code, said = attempt(lambda tables: tables["peft"].update(target_modules=["query"]))
    assert code == 5
    assert "query" in said
    assert "q_proj" in said
    assert len(said.splitlines()) == 1


def test_missing_model(attempt: Attempt) -> None:
    code, said = attempt(lambda tables: tables.update(model={"path": "/nowhere/at/all"}))
    assert code == 5
    assert "/nowhere/at/all" in said


def test_missing_data(attempt: Attempt, tmp_path: Path) -> None:
    code, said = attempt(lambda tables: from_file(tables, str(tmp_path / "none.jsonl")))
    assert code == 4
    assert "none.jsonl" in said
    assert len(said.splitlines()) == 1


def test_row_without_the_templates_field(attempt: Attempt, tmp_path: Path) -> None:
    rows = good_rows()
    del rows[7]["answer"]
    code, said = attempt(lambda tables: from_file(tables, write_rows(tmp_path / "rows.jsonl", rows)))
    assert code == 4
    assert "answer" in said
    assert "8" in said, "rows are numbered from 1"


def test_label_outside_the_map(attempt: Attempt, tmp_path: Path, tiny_bert: str) -> None:
    rows = good_rows()
    rows[3]["label"] = 9
    path = write_rows(tmp_path / "rows.jsonl", rows)

    def change(tables: Tables) -> None:
        tables["model"] = {"path": tiny_bert, "task": "sequence-classification"}
        tables["peft"] = {"method": "lora", "r": 2, "target_modules": ["query", "value"]}
        tables["evaluation"] = {}
        from_file(tables, path)
        for key in ("prompt", "answer"):
            del tables["data"][key]
        tables["data"] |= {"text": "{prompt}", "label": "label", "labels": [0, 1]}

    code, said = attempt(change)
    assert code == 4
    assert "9" in said


def test_empty_client(attempt: Attempt, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    write_rows(folder / "full.jsonl", good_rows())
    (folder / "void.jsonl").write_text("")
    code, said = attempt(
        lambda tables: from_file(tables, str(folder / "*.jsonl"), partitioner={"kind": "files"})
    )
    assert code == 4
    assert "void" in said


def test_fewer_clients_than_the_cohort(attempt: Attempt) -> None:
    code, said = attempt(
        lambda tables: tables.update(federation={"sampling": {"kind": "fixed", "cohort": 9}})
    )
    assert code == 3
    assert "9" in said
    assert "4 clients" in said


def test_loss_that_is_not_finite(attempt: Attempt, tmp_path: Path) -> None:
    code, said = attempt(lambda tables: tables["training"].update(lr=1e30, optimizer="sgd", steps=4))
    assert code == 6
    assert "lower training.lr" in said
    assert len(said.splitlines()) == 1
    assert (tmp_path / "out" / "checkpoints" / "round-000000.safetensors").exists(), (
        "what was committed stays"
    )
    assert not (tmp_path / "out" / "adapter").exists()


def test_existing_run_and_contradicting_options(attempt: Attempt, tmp_path: Path) -> None:
    code, _ = attempt(lambda tables: tables["run"].update(rounds=1))
    assert code == 0
    code, said = attempt()
    assert code == 7
    assert "--resume" in said
    assert "--force" in said
    code, said = attempt(lambda tables: None, "--resume", str(tmp_path / "out"))
    assert code == 2
    code, said = attempt(lambda tables: None, "--engine", "steam", "--force")
    assert code == 2


def test_resume_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["simulate", "--resume", str(tmp_path / "none")])
    assert stopped.value.code == 7
    assert "holds no run" in capsys.readouterr().err


def test_override_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["simulate", "--set", "training.lr", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "KEY=VALUE" in capsys.readouterr().err
