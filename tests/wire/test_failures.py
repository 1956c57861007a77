"""Errors across processes: with all they hold within one owner's, as a code of a closed list beyond."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fedpeft
from fedpeft import errors
from fedpeft.errors import DataError, FedPEFTError, PolicyError, RunFileError, UpdateError
from fedpeft.v1 import federation_pb2 as pb
from fedpeft.wire.failures import (
    SENTENCES,
    code_of,
    from_message,
    from_record,
    from_text,
    policy_keys,
    to_failure,
    to_record,
    to_refusal,
    to_text,
    without_text,
)

SECRET = "row 1: field 'ssn' is '100-10-1000'"
CLASSES = sorted(
    (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FedPEFTError)),
    key=lambda kind: kind.__name__,
)


def one(kind: type[FedPEFTError]) -> FedPEFTError:
    if issubclass(kind, RunFileError):
        return kind("run.toml", ["data.train: " + SECRET, "run.seed: 7"])
    if issubclass(kind, PolicyError):
        return kind(SECRET, {"max_local_steps": 9.0, "runs": None})
    return kind(SECRET)


def test_the_tree_is_walked() -> None:
    assert len(CLASSES) > 15


@pytest.mark.parametrize("kind", CLASSES)
def test_a_record_holds_all_of_an_error(kind: type[FedPEFTError]) -> None:
    error, again = one(kind), from_record(to_record(one(kind)))
    assert type(again) is kind
    assert str(again) == str(error)
    assert vars(again) == vars(error)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_text_gives_the_class_back_and_is_one_line(kind: type[FedPEFTError]) -> None:
    text = to_text(one(kind))
    assert "\n" not in text
    assert type(from_text(text)) is kind
    assert from_text("KeyError: 'ssn'") is None
    assert from_text(kind.__name__) is None


@pytest.mark.parametrize("kind", CLASSES)
def test_no_word_of_an_error_is_in_its_message(kind: type[FedPEFTError]) -> None:
    """Whatever the error says, two of one class are the same bytes."""
    error = one(kind)
    sent: pb.Failure | pb.Refusal
    if isinstance(error, PolicyError):
        sent = to_refusal(error)
        assert sent == to_refusal(PolicyError("other words", {"max_local_steps": 3.0, "runs": None}))
    else:
        sent = to_failure(error)
        assert sent == to_failure(kind("other words") if kind is not RunFileError else kind("x", ["y"]))
    told = from_message(sent, "site-a")
    assert told.exit_code == error.exit_code or kind in (RunFileError, UpdateError, errors.UsageError)
    for text in (str(told), str(without_text(error, "site-a"))):
        assert text.startswith("site-a: ")
        assert "ssn" not in text
        assert "100" not in text


def test_errors_that_are_not_ours_have_a_code_too() -> None:
    assert code_of(KeyError("ssn")) == "internal"
    assert "ssn" not in str(from_message(to_failure(KeyError("ssn")), "a"))


def test_an_owner_tells_a_number_or_does_not() -> None:
    error = PolicyError("9 steps", {"max_local_steps": 9.0, "runs": None})
    assert "9" not in str(from_message(to_refusal(error, ()), "a"))
    told = from_message(to_refusal(error, ("max_local_steps", "runs")), "a")
    assert isinstance(told, PolicyError)
    assert told.limits == error.limits
    assert "policy.max_local_steps (9)" in str(told)


UNLISTED: dict[str, pb.Failure | pb.Refusal] = {
    "no code": pb.Failure(),
    "unknown code": pb.Failure.FromString(b"\x18\xe7\x07"),
    "no key": pb.Refusal(objections=[pb.Objection()]),
    "unknown key": pb.Refusal.FromString(b"\x1a\x03\x08\xe7\x07"),
    "no objection": pb.Refusal(),
    "too many": pb.Refusal(objections=[pb.Objection(key=pb.POLICY_KEY_RUNS)] * 33),
    "no number": pb.Refusal(objections=[pb.Objection(key=pb.POLICY_KEY_RUNS, limit=float("nan"))]),
    "text of an old version": pb.Failure.FromString(b"\x0a\x09DataError\x12\x03ssn"),
}


@pytest.mark.parametrize("name", sorted(UNLISTED))
def test_what_is_not_in_the_list_is_refused(name: str) -> None:
    with pytest.raises(UpdateError, match="site-a") as raised:
        from_message(UNLISTED[name], "site-a")
    assert "ssn" not in str(raised.value)


def test_the_lists_of_schema_and_code_are_one() -> None:
    names = {name.removeprefix("FAILURE_CODE_").lower().replace("_", "-") for name in pb.FailureCode.keys()}  # noqa: SIM118
    assert names - {"unspecified"} == set(SENTENCES)
    assert {kind.code for kind in CLASSES} - {"policy"} <= set(SENTENCES)
    assert len(policy_keys()) == len(pb.PolicyKey.keys()) - 1


def test_errors_are_looked_up_by_name_here_alone() -> None:
    """Another reader of errors by class name would be a second codec."""
    root = Path(fedpeft.__file__).parents[1]
    files = [path for room in ("fedpeft", "client", "server") for path in (root / room).rglob("*.py")]
    readers = [
        path.relative_to(root).as_posix()
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "getattr"
        and "errors" in ast.unparse(node.args[0])
    ]
    assert readers == ["fedpeft/wire/failures.py"]
    assert DataError.code == "data"
