"""Each format gives the same rows back, and damage is named by file and row."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedpeft.data.describe import list_names, show
from fedpeft.data.hub import parse_hub_source
from fedpeft.data.readers import READERS, read_csv, read_jsonl, read_parquet, read_tsv
from fedpeft.data.run_sources import find_parts
from fedpeft.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"text": "plain", "n": "007"},
    {"text": 'with "quotes", commas\nand lines', "n": "2024-01-02"},
    {"text": "é \u2028 日本", "n": "1.50"},
    {"text": "", "n": "null"},
]


def test_jsonl_keeps_values_and_counts_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    path.write_text("\ufeff" + lines[0] + "\r\n\n" + "\n".join(lines[1:]), encoding="utf-8")
    assert list(read_jsonl(path)) == list(zip([1, 3, 4, 5], ROWS, strict=True))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{'a': 1}", "row 2 is not JSON"),
        (b'{"a": 1', "row 2 is not JSON"),
        (b"[1]", "row 2 is a JSON list"),
        ('{"a": "é日本"}\n{"a": "\udcff"}'.encode("utf-8", "surrogateescape"), "not JSON .*data.encoding"),
        (b'{"a": 1, "a": 2}', "row 2 .*the field 'a' twice"),
        (b"[" * 200_000, "row 2 is not JSON"),
    ],
)
def test_bad_jsonl_names_file_and_row(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        list(read_jsonl(path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("reader", "delimiter"), [(read_csv, ","), (read_tsv, "\t")])
def test_csv_values_stay_text(tmp_path: Path, reader: Any, delimiter: str) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["text", "n"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    assert list(reader(path)) == list(enumerate(ROWS, start=1))


def test_csv_takes_fields_beyond_the_standard_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text\n" + "x" * 200_000 + "\n")
    assert len(next(read_csv(path))[1]["text"]) == 200_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "needs a first line"),
        ("a,a\n1,2\n", "each once"),
        ("a,b\n1,2\n3\n", "row 2 has 1 values for 2 columns"),
        ("a,b\n1,2\n3,4,5\n", "row 2 has 3 values for 2 columns"),
        ('a,b\n1,2\n"3"x,4\n', "row 2 cannot be read"),
    ],
)
def test_bad_csv_names_file_and_row(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        list(read_csv(path))


def test_csv_with_a_damaged_letter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("a\né日本\n".encode() + b"\xff\n")
    with pytest.raises(DataError, match="needs UTF-8"):
        list(read_csv(path))


def test_parquet_keeps_types_beyond_one_batch(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "n": i, "list": ["a"] * (i % 3)} for i in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(read_parquet(tmp_path / "a.parquet")) == list(enumerate(rows, start=1))


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nothing of the kind PAR1")
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        list(read_parquet(path))


def test_every_suffix_is_read_through_a_folder_in_natural_order(tmp_path: Path) -> None:
    for number, suffix in zip([10, 9, 8, 7, 6, 2, 1], set(READERS) - {".txt"}, strict=True):
        (tmp_path / f"client{number}{suffix.upper() if number == 2 else suffix}").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "._client1.jsonl").touch()
    (tmp_path / "deeper.jsonl").mkdir()
    parts = find_parts(str(tmp_path))
    assert [part.name for part in parts] == [f"client{n}" for n in (1, 2, 6, 7, 8, 9, 10)]


def test_patterns_and_lists(tmp_path: Path) -> None:
    for name in ("a1", "a2", "b1"):
        (tmp_path / f"{name}.jsonl").write_text('{"x": 1}\n')
    sources = (str(tmp_path / "b1.jsonl"), str(tmp_path / "a*.jsonl"))
    parts = find_parts(sources)
    assert [part.name for part in parts] == ["b1", "a1", "a2"]
    assert [list(part.rows()) for part in parts] == [[(1, {"x": 1})]] * 3
    assert list(parts[0].rows()) == list(parts[0].rows())


@pytest.mark.parametrize(
    "source", ["nowhere.jsonl", "nowhere/*.jsonl", (), "x" * 5000, "a\0b", "../**/**x\0"]
)
def test_sources_that_are_not_there(source: Any) -> None:
    with pytest.raises(DataError, match=r"no data is there|no data can be there|is empty") as caught:
        find_parts(source)
    assert len(str(caught.value)) < 400


def test_a_suffix_without_reader_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.xlsx"
    path.touch()
    with pytest.raises(DataError, match=r"no reader for '\.xlsx' files; needs one of \.jsonl"):
        find_parts(str(path))


@pytest.mark.parametrize(
    ("source", "parsed"),
    [
        ("datasets:owner/name:test", ("owner/name", None, "test")),
        ("datasets:owner/name/config:train[:10%]", ("owner/name", "config", "train[:10%]")),
    ],
)
def test_hub_names(source: str, parsed: tuple[str, str | None, str]) -> None:
    assert parse_hub_source(source) == parsed


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a//b",
        "a/b/c/d",
        ":test",
        "imdb",
        "pandas",
        "pandas:test",
        "./a",
        "../a/b",
        "/etc/x",
        "a/..",
        "~/a",
    ],
)
def test_hub_names_that_are_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imdb").mkdir()  # nor does a folder make it one
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"write datasets:OWNER/NAME"):
        parse_hub_source(f"datasets:{name}")


HUB_SCRIPT = """
import shutil
from pathlib import Path
import datasets
from fedpeft.data.hub import read_hub
from fedpeft.errors import DataError
datasets.disable_progress_bars()
cache = Path(datasets.config.HF_DATASETS_CACHE)
Path("rows.jsonl").write_text('{"a": "x", "b": 1}\\n{"a": "y", "b": 2}\\n')
datasets.load_dataset("json", data_files={"train": "rows.jsonl"})
(made,) = cache.glob("json/default-*/0.0.0/*/dataset_info.json")
cached = cache / "owner___cached" / "default" / "0.0.0" / made.parent.name  # as if it had been fetched
shutil.copytree(made.parent, cached)
(cached / "json-train.arrow").rename(cached / "cached-train.arrow")
datasets.enable_progress_bars()
Path("owner/folder").mkdir(parents=True)
shutil.copy("rows.jsonl", "owner/folder/train.jsonl")
for name in ("owner/cached", "owner/cached:no-split", "owner/folder", "pandas/x", "no-owner/no-set"):
    try:
        print(list(read_hub(f"datasets:{name}")))
    except DataError as error:
        print("|", error)
"""


def test_only_the_hub_and_its_cache_are_read_without_a_network_or_a_progress_bar(tmp_path: Path) -> None:
    """In a process of its own: the library fixes its cache folder when it is first imported."""
    env = {**os.environ, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", HUB_SCRIPT]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
    )
    rows, *errors = done.stdout.splitlines()
    assert rows == "[(1, {'a': 'x', 'b': 1}), (2, {'a': 'y', 'b': 2})]"
    assert [line.partition(": cannot be loaded")[0] for line in errors] == [
        "| datasets:owner/cached:no-split",
        "| datasets:owner/folder",  # which the library would read by that name
        "| datasets:pandas/x",
        "| datasets:no-owner/no-set",
    ]
    assert "%|" not in done.stderr


def test_messages_stay_short_and_on_one_line() -> None:
    assert len(show("x" * 1000)) == 60
    assert list_names(["a\nb"] + ["c"] * 9) == "a b, " + ", ".join(["c"] * 7) + " and 2 more"
    assert list_names([]) == "none"
