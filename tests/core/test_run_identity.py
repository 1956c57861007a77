"""A run's identity: what differs from the defaults, whatever later versions add or change."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import create_model

from fedpeft.config.run_file import build_run, load_run, run_digest, run_from_json, run_json
from fedpeft.config.run_identity import RUN_SCHEMA, differing_keys, identity_text, read_identity
from fedpeft.config.sections import ModelSection, RunConfig, TrainingSection
from fedpeft.errors import RunFileError

ROOT = Path(__file__).resolve().parents[2]
RUN_FILES = sorted([*ROOT.glob("simulations/*.toml"), *ROOT.glob("fedpeft/config/presets/*.toml")])
TABLES: dict[str, Any] = {
    "run": {"name": "small", "rounds": 2},
    "peft": {"method": "lora", "r": 4},
    "training": {"steps": 3},
    "stages": [{"kind": "clip", "clip_norm": 1.0}],
}


def small() -> RunConfig:
    return build_run(TABLES, source="small")


def test_it_names_what_differs_from_the_defaults_and_nothing_else() -> None:
    assert json.loads(run_json(small())) == {"schema": RUN_SCHEMA, **TABLES | {"peft": {"r": 4}}}
    spelled_out = build_run(small().model_dump(mode="json"), source="all keys")
    assert run_json(spelled_out) == run_json(small())


def test_it_is_the_digest_of_the_text_as_it_came() -> None:
    text = run_json(small()).replace(",", ", ")  # as another version might write it
    assert run_digest(run_from_json(text)) == hashlib.sha256(text.encode()).hexdigest()
    assert run_from_json(text) == small()


def test_a_changed_copy_is_another_run() -> None:
    run = run_from_json(run_json(small()))
    before = run_digest(run)
    other = run.model_copy(update={"training": TrainingSection(steps=4)})
    assert run_digest(other) != before
    assert run_digest(other.model_copy(update={"training": run.training})) == before
    assert run_digest(run.model_copy()) == before


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: path.stem)
def test_it_reads_back_to_the_same_run(path: Path) -> None:
    run = load_run(path)
    again = run_from_json(run_json(run))
    assert again == run
    assert identity_text(again) == run_json(run)


def test_a_key_that_a_later_version_adds_changes_no_identity() -> None:
    later = create_model("Later", __base__=ModelSection, shards=(int, 1))
    for path in ("embedded", "folder"):
        now = ModelSection(path=path, quantization="rtn8", keep_modules=("head",))
        assert differing_keys(later.model_validate(now.model_dump())) == differing_keys(now)


def test_a_default_that_a_later_version_changes_is_written_into_earlier_runs() -> None:
    """Schema 1 had 8 as the default of a.x and 1 as that of b; schema 3 came after a second change of a.x."""
    old = {1: {"a.x": 8, "b": 1}, 2: {"a.x": 16}}

    def read(tables: dict[str, Any]) -> dict[str, Any]:
        return read_identity(json.dumps(tables), schema=3, old_defaults=old)

    assert read({"schema": 1}) == {"a": {"x": 8}, "b": 1}
    assert read({"schema": 1, "a": {"x": 5, "y": 2}}) == {"a": {"x": 5, "y": 2}, "b": 1}
    assert read({"schema": 2, "a": {"y": 2}}) == {"a": {"x": 16, "y": 2}}
    assert read({"schema": 3, "b": 7}) == {"b": 7}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[]", "not a JSON object"),
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("{}", "its schema is None"),
        (f'{{"schema": {RUN_SCHEMA + 1}}}', "this version knows 1 to"),
        ('{"schema": true}', "its schema is True"),
        ('{"schema": 0}', "its schema is 0"),
        ('{"schema": 1, "run": {"name": "x"}}', "run.rounds: is needed and missing"),
    ],
)
def test_texts_that_are_no_identity_are_refused(text: str, problem: str) -> None:
    with pytest.raises(RunFileError, match=problem):
        run_from_json(text)
