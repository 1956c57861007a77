"""A digest of rows changes with anything that training would see, and with nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fedpeft.config.sections import DataSection
from fedpeft.data.row_digest import rows_digest
from fedpeft.data.run_tables import read_tables
from tests.data.loading import load_client, load_federated

ROWS = [{"q": f"q{i}", "a": f"a{i}", "who": f"w{i % 2}", "other": i} for i in range(12)]


def digest(path: Path, **keys: Any) -> str:
    partitioner = {"kind": "natural", "by": "who"}
    section = {"train": str(path), "prompt": "{q}", "answer": "{a}", "partitioner": partitioner, **keys}
    return rows_digest(read_tables(DataSection.model_validate(section), "causal-lm", seed=0))


def test_the_place_of_a_file_and_columns_that_nobody_reads_play_no_part(
    write_rows: Any, tmp_path: Path
) -> None:
    first = digest(write_rows("a.jsonl", ROWS))
    moved = Path(shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.jsonl"))
    assert digest(moved) == first
    assert digest(write_rows("c.jsonl", [{**row, "other": 0} for row in ROWS])) == first


def test_every_change_of_what_is_trained_on_changes_it(write_rows: Any) -> None:
    path = write_rows("a.jsonl", ROWS)
    found = [
        digest(path),
        digest(path, heldout=0.5),
        digest(path, test=str(path)),
        digest(path, user="other"),
    ]
    for number, rows in enumerate(
        (
            ROWS[:-1],
            [*ROWS, ROWS[-1]],
            list(reversed(ROWS)),
            [{**ROWS[0], "a": "A0"}, *ROWS[1:]],
            [{**ROWS[0], "q": "q0a", "a": "0"}, *ROWS[1:]],  # the same letters, cut elsewhere
            [{**row, "who": f"w{row['who']}"} for row in ROWS],
        )
    ):
        found.append(digest(write_rows(f"{number}.jsonl", rows)))
    assert len(set(found)) == len(found)


def test_encoded_rows_carry_it_in_a_simulation_and_on_a_device(write_rows: Any, tokenizer: Any) -> None:
    path = write_rows("a.jsonl", ROWS)
    keys = DataSection.model_validate({"train": str(path), "prompt": "{q}", "answer": "{a}"})
    own = load_client(keys, path, task="causal-lm", tokenizer=tokenizer, seed=0, name="north")
    again = load_client(keys, path, task="causal-lm", tokenizer=tokenizer, seed=0, name="north")
    other = load_client(keys, path, task="causal-lm", tokenizer=tokenizer, seed=0, name="south")
    assert own.rows_digest == again.rows_digest != other.rows_digest
    whole = keys.model_copy(update={"partitioner": keys.partitioner.model_copy(update={"clients": 2})})
    simulated = load_federated(whole, task="causal-lm", tokenizer=tokenizer, seed=0)
    assert len(simulated.rows_digest) == 64
