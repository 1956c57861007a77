"""Files as people have them: packed, of other encodings and separators, in folders, with classes by name."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedpeft.config.run_file import load_run
from fedpeft.config.sections import DataSection, RunConfig
from fedpeft.data.labels import natural_key
from fedpeft.data.run_sources import find_parts
from fedpeft.data.run_tables import read_tables
from fedpeft.data.sources import find_files
from fedpeft.data.tables import RawFederated, read_client_table
from fedpeft.data.text_files import Reading
from fedpeft.errors import DataError

ROWS: list[dict[str, Any]] = [{"text": f"row {i} é", "label": "ab"[i % 2]} for i in range(6)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def rows_in(path: Path | str, **how: Any) -> list[dict[str, Any]]:
    return [dict(row) for part in find_files(str(path), Reading(**how)) for _, row in part.rows()]


def packed_zst(content: bytes, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.CompressedOutputStream(file, "zstd") as stream:
        stream.write(content)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("form", [".jsonl", ".json", ".csv"])
def test_packed_files_are_unpacked_while_they_are_read(tmp_path: Path, form: str, suffix: str) -> None:
    content = {".jsonl": LINES, ".json": json.dumps(ROWS), ".csv": "text,label\nx,1\n"}[form].encode()
    path = tmp_path / f"north{form}{suffix}"
    if suffix == ".zst":
        packed_zst(content, path)
    else:
        path.write_bytes({".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(content))
    assert rows_in(path) == ([{"text": "x", "label": "1"}] if form == ".csv" else ROWS)
    assert find_files(str(tmp_path))[0].name == "north"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cannot be unpacked|cannot be read"):
        rows_in(path)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\ufeff" + json.dumps({"version": "1", "data": ROWS}, indent=1),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_documents_are_lists_of_rows(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text(text, encoding="utf-8")
    assert rows_in(path) == ROWS


def test_a_single_object_that_is_spread_out_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ROWS[0], indent=2))
    assert rows_in(path) == ROWS[:1]


def test_an_array_of_no_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, 2]')
    with pytest.raises(DataError, match="row 2 is a JSON int"):
        rows_in(path)


@pytest.mark.parametrize(
    "encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "windows-1252"]
)
def test_encodings_are_found_out(tmp_path: Path, encoding: str) -> None:
    reading = Reading()
    for suffix, text in ((".jsonl", LINES), (".csv", "text,label\nrow é,b\n"), (".txt", "row é\n")):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(text.encode(encoding))
        found = [row for part in find_files(str(path), reading) for _, row in part.rows()]
        assert found[0]["text"].endswith("é")
    assert len(reading.notes) == (3 if encoding == "windows-1252" else 0)


def test_an_encoding_can_be_set_and_must_exist(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("text\nпривет\n".encode("koi8-r"))
    assert rows_in(path, encoding="koi8-r") == [{"text": "привет"}]
    with pytest.raises(ValueError, match="is no encoding"):
        DataSection.model_validate({"encoding": "koi9"})
    path.write_bytes(b"text\n\x81\x8d\x90\n")  # none of windows-1252's letters
    with pytest.raises(DataError, match=r"data\.encoding"):
        rows_in(path)


@pytest.mark.parametrize("separator", [";", "\t", "|", ","])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_separators_are_found_out_and_said(tmp_path: Path, suffix: str, separator: str) -> None:
    path = tmp_path / f"a{suffix}"
    lines = [separator.join(pair) for pair in (("text", "label"), ("x" if separator == "," else "x, y", "1"))]
    path.write_text("\n".join(lines) + "\n")
    reading = Reading()
    found = [dict(row) for part in find_files(str(path), reading) for _, row in part.rows()]
    assert found == [{"text": lines[1].split(separator)[0], "label": "1"}]
    usual = {".csv": ",", ".tsv": "\t"}[suffix]
    assert len(reading.notes) == (separator != usual)


def test_a_separator_can_be_set(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text~label\nx~1\n")
    assert rows_in(path, separator="~") == [{"text": "x", "label": "1"}]


def test_quotation_marks_in_tab_separated_files(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    signs = 'text\tlabel\n"good film\t1\nhe said "no"\t0\nthe "end\t1\n'
    path.write_text(signs)
    reading = Reading()
    rows = [dict(row) for part in find_files(str(path), reading) for _, row in part.rows()]
    assert [row["text"] for row in rows] == ['"good film', 'he said "no"', 'the "end']
    assert "data.quoting" in reading.notes[0]
    path.write_text('text\tlabel\n"he said ""no"""\t0\n"two\nlines"\t1\n')
    assert [row["text"] for row in rows_in(path)] == ['he said "no"', "two\nlines"]
    path.write_text('text\tlabel\n"x"\t0\n')
    assert [row["text"] for row in rows_in(path)] == ["x"]
    assert [row["text"] for row in rows_in(path, quoting="none")] == ['"x"']


def test_plain_text_is_a_row_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("one\r\n\r\n  two é\n".encode())
    part = find_files(str(path))[0]
    assert list(part.rows()) == [(1, {"text": "one"}), (3, {"text": "  two é"})]


def read(tmp_path: Path, train: Path | str, **keys: Any) -> RawFederated:
    partitioner = {"kind": "files"}
    section = {"train": str(train), "text": "{text}", "partitioner": partitioner, **keys}
    return read_tables(DataSection.model_validate(section), "causal-lm", 0)


def test_a_folder_per_client(tmp_path: Path) -> None:
    for client in ("north", "south"):
        (tmp_path / "clients" / client).mkdir(parents=True)
        for month in ("1", "2"):
            (tmp_path / "clients" / client / f"rows{month}.jsonl").write_text(LINES)
    raw = read(tmp_path, tmp_path / "clients")
    assert [(c.name, len(c.train) + len(c.heldout)) for c in raw.clients] == [("north", 12), ("south", 12)]
    raw = read(tmp_path, tmp_path / "clients" / "*" / "rows1.jsonl")
    assert [(c.name, len(c.train) + len(c.heldout)) for c in raw.clients] == [("north", 6), ("south", 6)]


def test_brackets_in_folders_are_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "study [v2]" / "a[1]"
    folder.mkdir(parents=True)
    for name in ("x.jsonl", "y[1].jsonl"):
        (folder / name).write_text(LINES)
    assert [part.name for part in find_files(str(folder / "*.jsonl"))] == ["x", "y[1]"]
    assert [part.name for part in find_files(str(folder / "y[1].jsonl"))] == ["y[1]"]
    assert [part.name for part in find_files(str(folder / "[xz].jsonl"))] == ["x"]


def run_file(folder: Path, train: str) -> Path:
    path = folder / "run.toml"
    path.write_text(
        f'[run]\nname = "x"\nrounds = 1\n[data]\ntrain = {json.dumps(train)}\ntext = "{{text}}"\n'
    )
    return path


def rows_of_run(run: RunConfig) -> int:
    assert isinstance(run.data.train, str)
    return len(rows_in(run.data.train))


def test_paths_of_run_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links keep their names, `~` is the user's folder, brackets in folders are no pattern."""
    folder = tmp_path / "study [v2]"
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / "0c1fe").write_text(LINES)
    (folder / "train.jsonl").symlink_to("blobs/0c1fe")
    monkeypatch.setenv("HOME", str(folder))
    for train in ("train.jsonl", "*.jsonl", "~/train.jsonl", "~/*.jsonl", "../study [v2]/train.jsonl"):
        run = load_run(run_file(folder, train))
        assert rows_of_run(run) == 6, train
        assert Path(str(run.data.train)).is_absolute(), train


def test_classes_of_columnar_files_go_by_name_or_number(tmp_path: Path) -> None:
    features = {"info": {"features": {"label": {"names": ["pos", "neg"], "_type": "ClassLabel"}}}}
    table = pa.table({"text": [f"t{i}" for i in range(6)], "label": [0, 1, 0, 1, 1, 1]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, tmp_path / "a.parquet")

    def labels(**keys: Any) -> tuple[tuple[str, ...], list[int]]:
        section = {
            "train": str(tmp_path / "a.parquet"), "text": "{text}", "label": "label",
            "partitioner": {"kind": "iid", "clients": 1}, **keys,
        }  # fmt: skip
        raw = read_tables(DataSection.model_validate(section), "sequence-classification", 0)
        assert raw.rows.labels is not None
        return raw.label_names, raw.rows.labels.tolist()

    assert labels() == (("pos", "neg"), [0, 1, 0, 1, 1, 1])  # in the file's own order
    assert labels(labels=["neg", "pos"]) == (("neg", "pos"), [1, 0, 1, 0, 0, 0])
    assert labels(labels=[0, 1]) == (("0", "1"), [0, 1, 0, 1, 1, 1])
    for wanted in (1, "neg"):
        with pytest.raises(DataError, match="one class only, 'neg'"):
            labels(filter={"label": wanted})


def test_saved_data_sets(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    made = datasets.Dataset.from_dict({"text": ["x", "y", "z"], "label": [0, 1, -1]}, features=features)
    made.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(tmp_path / "two")
    wanted = [{"text": "x", "label": "no"}, {"text": "y", "label": "yes"}, {"text": "z", "label": None}]
    assert rows_in(tmp_path / "one") == rows_in(tmp_path / "two") == wanted
    assert [part.name for part in find_files(str(tmp_path / "one"))] == ["one"]
    tested = find_parts(str(tmp_path / "two"), split="test")
    assert [dict(row) for _, row in tested[0].rows()] == wanted[1:2]
    with pytest.raises(DataError, match="no split 'validation'; name the folder of one of train, test"):
        find_parts(str(tmp_path / "two"), split="validation")


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match="'a' is there twice"):
        rows_in(tmp_path / "a.parquet")


def test_what_was_found_out_is_said_with_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text;label\nx;1\ny;2\n")
    raw = read(tmp_path, path)
    assert len(raw.notes) == 1
    assert "semicolons" in raw.notes[0]
    own = read_client_table(DataSection(train="x", text="{text}"), path, "causal-lm", 0, "north")
    assert own.notes == raw.notes


def test_identifiers_of_thousands_of_digits(tmp_path: Path) -> None:
    long = "9" * 6000
    assert natural_key("c2") < natural_key("c010") < natural_key(f"c{long}") < natural_key(f"c1{long}")
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "t", "who": {who}, "n": 1}}\n' for who in (long, "7", long, '"x"')))
    raw = read(tmp_path, path, partitioner={"kind": "natural", "by": "who"}, user="who", heldout=0.0)
    assert [len(client.train) for client in raw.clients] == [1, 2, 1]
    assert raw.rows.users is not None
    assert len(np.unique(raw.rows.users)) == 3
    assert raw.rows.users.nbytes == 4 * 8


def test_filters_compare_what_files_write(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,good\nx,true\ny,False\nz,TRUE\n")
    assert len(read(tmp_path, path, filter={"good": True}).rows) == 2


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(LINES)
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "._a.jsonl")
    assert [part.name for part in find_files(str(tmp_path))] == ["a"]
    assert [part.name for part in find_files(str(tmp_path / "*.jsonl"))] == ["a"]


def test_where_rows_are_hidden_no_row_decides_how_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    for row in ('"a good film\t1', "a;b;c\t1", "a"):
        path.write_text("text\tlabel\nx\t1\n")
        alone = rows_in(path, hides_rows=True)
        path.write_text("text\tlabel\nx\t1\n" + row + "\n")
        found = find_files(str(path), Reading(hides_rows=True))[0].rows()
        assert dict(next(found)[1]) == alone[0]
    path.write_bytes("text\tlabel\né\t1\n".encode() + b"\xe9\xe9\xe9\t1\n")
    with pytest.raises(DataError, match="needs UTF-8"):  # not taken for another encoding
        rows_in(path, hides_rows=True)


def test_quotation_marks_that_may_glue_rows_of_a_csv_file_are_said(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"good film,1\nbad one,0\nthe end",1\n')
    reading = Reading()
    assert len([row for part in find_files(str(path), reading) for row in part.rows()]) == 1
    assert "glue rows" in reading.notes[0]
    assert len(rows_in(path, quoting="none")) == 3
    path.write_text('text,label\n"one, two\nthree\n",1\n"four",0\n')
    reading = Reading()
    assert len([row for part in find_files(str(path), reading) for row in part.rows()]) == 2
    assert reading.notes == []
