"""Run files: every problem at once, overrides, and an identity that survives writing and reading."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpeft.config.run_file import build_run, load_run, run_digest, run_from_json, run_json, run_toml
from fedpeft.config.sections import RunConfig
from fedpeft.errors import RunFileError, UsageError

ROOT = Path(__file__).resolve().parents[2]
RUN_FILES = sorted([*ROOT.glob("simulations/*.toml"), *ROOT.glob("fedpeft/config/presets/*.toml")])

SMALL: dict[str, Any] = {
    "run": {"name": "small", "rounds": 2},
    "data": {"partitioner": {"kind": "iid", "clients": 3}},
    "stages": [{"kind": "clip", "clip_norm": 1.0}],
}


def small(*overrides: str, **tables: Any) -> RunConfig:
    return build_run({**SMALL, **tables}, overrides, source="small")


def problems(table: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(RunFileError) as caught:
        build_run(table, source="bad.toml")
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def reread(run: RunConfig) -> RunConfig:
    return build_run(tomllib.loads(run_toml(run)), source="again")


def test_every_problem_is_reported_at_once() -> None:
    found = problems(
        {
            "run": {"rounds": 0, "seed": -1, "naem": "x"},
            "model": {"quantization": "int3"},
            "data": {"partitioner": {"kind": "dirichlet", "clients": 3}},
            "federation": {"quorum": 1.5, "sampling": {"kind": "fixed"}},
            "trainnig": {},
        }
    )
    expected = {
        "run.name: is needed and missing",
        "run.rounds: ",
        "run.seed: ",
        "run.naem: unknown key",
        "model.quantization: ",
        "data.partitioner: partitioner 'dirichlet' needs by, alpha",
        "federation.quorum: ",
        "federation.sampling: sampling 'fixed' needs cohort; cohort was not given",
        "trainnig: unknown key",
    }
    assert len(found) == len(expected)
    assert [start for start in expected if not any(line.startswith(start) for line in found)] == []


def test_a_problem_says_what_came() -> None:
    (found,) = problems({"run": {"name": "x", "rounds": "many"}, "data": SMALL["data"]})
    assert "run.rounds" in found
    assert "'many'" in found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_must_be_finite(value: float) -> None:
    assert "training.lr" in problems({**SMALL, "training": {"lr": value}})[0]


@pytest.mark.parametrize("name", ["", "a/b", "../up", ".hidden", "x" * 81, "a b"])
def test_names_of_runs_are_safe_folder_names(name: str) -> None:
    assert "run.name" in problems({**SMALL, "run": {"name": name, "rounds": 1}})[0]


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("training.lr=1e-4", lambda run: run.training.lr == 1e-4),
        ("run.rounds=7", lambda run: run.run.rounds == 7),
        ("run.name=other", lambda run: run.run.name == "other"),
        ("evaluation.baselines=true", lambda run: run.evaluation.baselines is True),
        ("stages.0.clip_norm=2.5", lambda run: run.stages[0].options == {"clip_norm": 2.5}),
        ("federation.strategy=krum", lambda run: run.federation.strategy.kind == "krum"),
        ("federation.strategy.eta=0.5", lambda run: run.federation.strategy.options == {"eta": 0.5}),
        ('peft.target_modules=["q", "v"]', lambda run: run.peft.options == {"target_modules": ["q", "v"]}),
    ],
)
def test_overrides(override: str, read: Any) -> None:
    assert not read(small())
    assert read(small(override))


def test_an_override_opens_a_bare_name() -> None:
    run = small("federation.strategy.eta=0.5", federation={"strategy": "fedadam"})
    assert (run.federation.strategy.kind, run.federation.strategy.options) == ("fedadam", {"eta": 0.5})


def test_an_override_without_a_value_takes_the_key_out() -> None:
    run = small("training.max_grad_norm=", "stages.0=", training={"lr": 0.5, "max_grad_norm": 2.0})
    assert (run.training.lr, run.training.max_grad_norm) == (0.5, small().training.max_grad_norm)
    assert run.training.max_grad_norm != 2.0
    assert len(run.stages) == len(small().stages) - 1


def test_the_last_override_wins_and_the_table_is_left_alone() -> None:
    table = {"run": {"name": "x", "rounds": 1}, "data": SMALL["data"]}
    assert build_run(table, ["run.rounds=2", "run.rounds=3"], source="x").run.rounds == 3
    assert table["run"] == {"name": "x", "rounds": 1}


@pytest.mark.parametrize(
    "override",
    [
        "lr",
        "=1",
        "training..lr=1",
        "stages.9.clip_norm=1",
        "stages.x=1",
        "run.seed.x=1",
        "training.batch_size=",
    ],
)
def test_a_wrong_override_is_refused(override: str) -> None:
    with pytest.raises((UsageError, RunFileError)) as caught:
        small(override, run={"name": "x", "rounds": 1, "seed": 3})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_shipped_run_files_keep_their_identity(path: Path) -> None:
    run = load_run(path)
    assert run_digest(reread(run)) == run_digest(run)
    assert reread(run) == run
    assert run_from_json(run_json(run)) == run


VALUES = st.recursive(
    st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3),
    max_leaves=5,
)
OPTIONS = st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), VALUES, max_size=3)


@given(options=OPTIONS, lr=st.floats(1e-9, 1e3), excluded=st.lists(st.integers() | st.text(), max_size=3))
def test_the_identity_survives_toml(options: dict[str, Any], lr: float, excluded: list[int | str]) -> None:
    options = {key: value for key, value in options.items() if key not in ("kind", "method")}
    partitioner = {"kind": "natural", "by": "who", "exclude": excluded}
    run = small(
        stages=[{"kind": "clip", **options}],
        training={"lr": lr},
        data={"partitioner": partitioner},
    )
    assert run_digest(reread(run)) == run_digest(run)
    assert run_digest(run_from_json(run_json(run))) == run_digest(run)


def test_the_identity_ignores_how_it_is_written_and_sees_what_it_says() -> None:
    assert run_digest(small("training.lr=1e-3")) == run_digest(small("training.lr=0.001"))
    assert run_digest(small(federation={"strategy": "fedavg"})) == run_digest(small())
    others = ("training.lr=0.5", "run.seed=1", "run.name=b", "stages.0.clip_norm=2.0", "data.text=x")
    assert len({run_digest(small()), *(run_digest(small(item)) for item in others)}) == 6


def test_a_run_file_is_read_with_its_paths(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.jsonl").write_text("{}")
    file = tmp_path / "run.toml"
    file.write_text('[run]\nname = "x"\nrounds = 1\n[data]\ntrain = "rows/a.jsonl"\n'
                    'test = "elsewhere.jsonl"\npartitioner = { kind = "iid", clients = 2 }\n')  # fmt: skip
    run = load_run(file)
    assert run.data.train == str((tmp_path / "rows" / "a.jsonl").resolve())
    assert run.data.test == "elsewhere.jsonl"


@pytest.mark.parametrize("text", [b"[run\n", b"a = 1\na = 2\n", b"\xff\xfe\x00"])
def test_what_is_not_toml_is_refused(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "run.toml"
    file.write_bytes(text)
    with pytest.raises(RunFileError, match="TOML"):
        load_run(file)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match="cannot be read"):
        load_run(tmp_path / "none.toml")
    with pytest.raises(RunFileError, match="cannot be read"):
        load_run(tmp_path)


@pytest.mark.parametrize("digits", [6000, 300_000])
def test_numbers_of_thousands_of_digits_are_one_short_line(tmp_path: Path, digits: int) -> None:
    number = "9" * digits
    file = tmp_path / "run.toml"
    file.write_text(f"[run]\nname = 'x'\nrounds = {number}\n")
    with pytest.raises(RunFileError, match="is not TOML") as caught:
        load_run(file)
    assert len(str(caught.value)) < 600
    file.write_text("[run]\nname = 'x'\nrounds = 1\n")
    with pytest.raises(RunFileError) as refused:
        load_run(file, [f"run.rounds={number}"])
    assert len(str(refused.value)) < 600
    assert load_run(file, [f"data.train={number}"]).data.train == number  # a name that no file has
    with pytest.raises(UsageError, match="no index"):
        load_run(file, ["stages=[]", f"stages.{number}.kind=x"])
