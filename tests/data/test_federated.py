"""Whole federations from small files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft.config.sections import DataSection
from fedpeft.data.embedded import make_federated_rows
from fedpeft.data.encoded import Task
from fedpeft.data.federated import FederatedData
from fedpeft.data.run_tables import read_tables
from fedpeft.errors import DataError
from tests.data.loading import load_client, load_federated

ROWS = [{"q": f"q{i}", "a": f"a{i}", "who": f"w{i % 3}", "y": "abc"[i % 3]} for i in range(30)]
LM: Task = "causal-lm"
CLASSIFIER: Task = "sequence-classification"


def section(**keys: Any) -> DataSection:
    return DataSection.model_validate({"partitioner": {"kind": "natural", "by": "who"}, **keys})


def prompts_of(data: FederatedData, tokenizer: Any, indices: Any) -> list[str]:
    return ["".join(tokenizer.convert_ids_to_tokens(data.rows.prompt(int(i))[1:])) for i in indices]


def test_clients_hold_their_rows_and_hold_some_out(write_rows: Any, tokenizer: Any) -> None:
    keys = section(train=str(write_rows("t.jsonl", ROWS)), prompt="{q}", answer="{a}", heldout=0.2)
    data = load_federated(keys, task=LM, tokenizer=tokenizer, seed=3)
    assert [client.name for client in data.clients] == ["w0", "w1", "w2"]
    for number, client in enumerate(data.clients):
        assert len(client.train) + len(client.heldout) == 10
        both = prompts_of(data, tokenizer, sorted([*client.train, *client.heldout]))
        assert both == [f"q{i}" for i in range(number, 30, 3)]
    heldout = np.concatenate([client.heldout for client in data.clients])
    assert 0 < len(heldout) < 15
    assert data.rows.answers is not None
    assert data.test.answers is not None
    assert list(data.test.answers) == [data.rows.answers[int(i)] for i in heldout]
    assert (data.num_labels, data.cut_rows, data.dropped_rows, data.unused_rows) == (None, 0, 0, 0)


def test_one_seed_one_federation(write_rows: Any, tokenizer: Any) -> None:
    def shares(seed: int) -> list[list[int]]:
        partitioner = {"kind": "dirichlet", "clients": 3, "by": "y", "alpha": 1.0}
        keys = section(train=str(write_rows("t.jsonl", ROWS)), text="{q}", partitioner=partitioner)
        clients = load_federated(keys, task=LM, tokenizer=tokenizer, seed=seed).clients
        return [rows.tolist() for client in clients for rows in (client.train, client.heldout)]

    assert shares(5) == shares(5)
    assert shares(5) != shares(6)


def test_rows_that_nobody_holds_are_left_behind(write_rows: Any, tokenizer: Any) -> None:
    partitioner = {"kind": "natural", "by": "who", "exclude": ["w1"], "clients": 1}
    path = str(write_rows("t.jsonl", [*ROWS, {**ROWS[2], "q": "last"}]))
    keys = section(
        train=path, test=path, test_filter={"who": "w1"}, prompt="{q}", answer="{a}", partitioner=partitioner
    )
    data = load_federated(keys, task=LM, tokenizer=tokenizer, seed=0)
    assert [client.name for client in data.clients] == ["w2"]
    (client,) = data.clients
    assert prompts_of(data, tokenizer, sorted([*client.train, *client.heldout]))[-1] == "last"
    assert (len(data.rows), data.unused_rows, data.unused_clients) == (11, 20, 1)
    assert data.test.answers is not None
    assert list(data.test.answers) == [f"a{i}" for i in range(1, 30, 3)]


def test_classes_come_from_the_training_rows(write_rows: Any, tokenizer: Any) -> None:
    train = str(write_rows("train.jsonl", ROWS))
    test = str(write_rows("test.jsonl", [{"q": "x", "y": "c"}, {"q": "y", "y": "a"}]))
    keys = section(train=train, test=test, text="{q}", label="y", partitioner={"kind": "iid", "clients": 2})
    raw = read_tables(keys, CLASSIFIER, 0)
    assert (raw.num_labels, raw.label_names) == (3, ("a", "b", "c"))
    data = load_federated(keys, task=CLASSIFIER, tokenizer=tokenizer, seed=0)
    assert data.rows.labels is not None
    assert data.rows.labels.tolist() == [i % 3 for i in range(30)]
    assert data.test.labels is not None
    assert data.test.labels.tolist() == [2, 0]


def test_classes_of_the_run_file(write_rows: Any, tokenizer: Any) -> None:
    keys = section(
        train=str(write_rows("t.jsonl", ROWS)), text="{q}", label="y", labels=["c", "b", "a", "never"]
    )
    data = load_federated(keys, task=CLASSIFIER, tokenizer=tokenizer, seed=0)
    assert data.num_labels == 4
    assert data.rows.labels is not None
    assert data.rows.labels.tolist() == [2 - i % 3 for i in range(30)]


def test_csv_and_jsonl_give_the_same_federation(write_rows: Any, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("q,a,who,y\n" + "".join(",".join(row.values()) + "\n" for row in ROWS))
    datas = [
        load_federated(
            section(train=str(path), prompt="{q}", answer="{a}"), task=LM, tokenizer=tokenizer, seed=0
        )
        for path in (write_rows("t.jsonl", ROWS), tmp_path / "t.csv")
    ]
    assert np.array_equal(datas[0].rows.input_ids, datas[1].rows.input_ids)
    assert np.array_equal(datas[0].test.input_ids, datas[1].test.input_ids)


def test_rows_with_nothing_to_learn_are_dropped_and_counted(write_rows: Any, tokenizer: Any) -> None:
    rows = [{"t": "abc", "who": "a"}, {"t": "", "who": "a"}, {"t": "x" * 30, "who": "a"}]
    keys = section(train=str(write_rows("t.jsonl", rows)), text="{t}", heldout=0.0, max_length=8)
    data = load_federated(keys, task=LM, tokenizer=tokenizer, seed=0)
    assert (data.cut_rows, data.dropped_rows, data.clients[0].train.tolist()) == (1, 1, [0, 2])
    assert len(data.test) == 0


def test_cut_and_dropped_test_rows_count_too(write_rows: Any, tokenizer: Any) -> None:
    train = str(write_rows("t.jsonl", [{"t": "abc", "who": "a"}] * 4))
    test = str(write_rows("e.jsonl", [{"t": "x" * 30}, {"t": ""}, {"t": "ok"}]))
    data = load_federated(
        section(train=train, test=test, text="{t}", max_length=8), task=LM, tokenizer=tokenizer, seed=0
    )
    assert (data.cut_rows, data.dropped_rows, data.test.lengths.tolist()) == (1, 1, [8, 3])


def test_empty_held_out_rows_are_dropped(write_rows: Any, tokenizer: Any) -> None:
    rows = [{"t": f"abc{i}" if i % 2 else "", "who": "a"} for i in range(20)]
    keys = section(train=str(write_rows("t.jsonl", rows)), text="{t}", heldout=0.5)
    data = load_federated(keys, task=LM, tokenizer=tokenizer, seed=0)
    (client,) = data.clients
    assert all(i % 2 for i in [*client.train, *client.heldout])
    assert len(client.train) + len(client.heldout) == 10
    assert len(data.test) == len(client.heldout) > 0


def test_each_file_is_a_client_and_a_device_splits_it_alike(
    write_rows: Any, tokenizer: Any, tmp_path: Path
) -> None:
    for name in ("c10", "c2"):
        write_rows(f"{name}.jsonl", [{**row, "q": f"{name}-{i}"} for i, row in enumerate(ROWS)])
    keys = section(train=str(tmp_path / "*.jsonl"), prompt="{q}", answer="{a}", partitioner={"kind": "files"})
    data = load_federated(keys, task=LM, tokenizer=tokenizer, seed=7)
    assert [client.name for client in data.clients] == ["c2", "c10"]
    for client in data.clients:
        path = tmp_path / f"{client.name}.jsonl"
        alone = load_client(keys, path, task=LM, tokenizer=tokenizer, seed=7, name=client.name)
        (own,) = alone.clients
        assert own.name == client.name
        for mine, theirs in ((own.train, client.train), (own.heldout, client.heldout)):
            assert prompts_of(alone, tokenizer, mine) == prompts_of(data, tokenizer, theirs)


def test_a_device_needs_the_classes_of_the_run(write_rows: Any, tokenizer: Any) -> None:
    path = write_rows("c.jsonl", ROWS)
    with pytest.raises(DataError, match=r"data\.labels is not set"):
        load_client(
            section(text="{q}", label="y"), path, task=CLASSIFIER, tokenizer=tokenizer, seed=0, name="c"
        )
    with pytest.raises(DataError, match="client c has no rows"):
        load_client(
            section(text="{q}", filter={"who": "none"}), path, task=LM, tokenizer=tokenizer, seed=0, name="c"
        )


def test_embedded_rows_bring_their_clients_and_their_held_out_rows(tokenizer: Any) -> None:
    train, test = make_federated_rows(4, 3, 10, 5)
    keys = DataSection.model_validate({"partitioner": {"clients": 3}, "limit": 30, "test_limit": 15})
    raw = read_tables(keys, LM, 4)
    assert raw.rows.answers is not None
    for number, client in enumerate(raw.clients):
        for rows, indices in ((train, client.train), (test, client.heldout)):
            pairs = [(raw.rows.prompts[int(i)], raw.rows.answers[int(i)]) for i in indices]
            assert pairs == [(row.prompt, row.answer) for row in rows if row.client == number]
    assert [client.name for client in raw.clients] == ["client-0", "client-1", "client-2"]


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (LM, {"text": "{q}{context}"}, "t.jsonl: row 1: field 'context', which data.text needs, is missing"),
    (LM, {"text": "{q}", "filter": {"who": "nobody"}}, "no training rows are left to deal"),
    (LM, {"text": "{q}", "test_filter": {"who": "nobody"}, "test": "SAME"}, "t.jsonl: no test rows are left"),
    (LM, {"text": "{nothing?}"}, "client w0 has no row with a token to learn"),
    (LM, {"text": "{q", "answer": "{a}"}, "data has answer, text; a language model needs either data.text"),
    (
        CLASSIFIER,
        {"text": "{q}", "label": "y", "labels": ["a", "b"]},
        "row 3: field 'y' is 'c', which is outside",
    ),
    (CLASSIFIER, {"text": "{q}", "label": "z"}, "row 1: field 'z' is missing"),
    (
        CLASSIFIER,
        {"text": "{q}", "label": "y", "filter": {"y": "a"}, "test": "SAME"},
        "row 2: field 'y' is 'b', which is outside the label map (a)",
    ),
]


@pytest.mark.parametrize(("task", "keys", "message"), BAD)
def test_bad_input_is_one_line(
    write_rows: Any, tokenizer: Any, task: Any, keys: dict[str, Any], message: str
) -> None:
    path = str(write_rows("t.jsonl", ROWS))
    given = {key: path if value == "SAME" else value for key, value in keys.items()}
    with pytest.raises(DataError) as caught:
        load_federated(section(train=path, **given), task=task, tokenizer=tokenizer, seed=0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_home_that_cannot_be_written_is_no_hindrance(write_rows: Any) -> None:
    script = (
        "import sys\nfrom fedpeft.config.sections import DataSection\n"
        "from fedpeft.data.run_tables import read_tables\n"
        "part = {'kind': 'dirichlet', 'clients': 2, 'by': 'y', 'alpha': 1.0}\n"
        "s = DataSection.model_validate({'train': sys.argv[1], 'text': '{q}', 'partitioner': part})\n"
        "print(len(read_tables(s, 'causal-lm', 0).clients))"
    )
    env = {"HOME": "/proc/nowhere", "PYTHONPATH": ":".join(filter(None, sys.path))}
    command = [sys.executable, "-c", script, str(write_rows("t.jsonl", ROWS))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("2\n", "", 0)
