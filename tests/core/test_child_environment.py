"""What processes that load models are told of their parent's environment."""

from __future__ import annotations

import pytest

from fedpeft.runtime.child_environment import LIBRARY_DEFAULTS, child_environment

SECRETS = {
    "HF_TOKEN": "1",
    "HUGGING_FACE_HUB_TOKEN": "1",
    "AWS_SECRET_ACCESS_KEY": "1",
    "GOOGLE_APPLICATION_CREDENTIALS": "1",
    "FEDPEFT_TOKEN": "1",
    "FEDPEFT_DATABASE": "1",
    "SSH_AUTH_SOCK": "1",
    "PGPASSWORD": "1",
    "https_proxy": "http://me:secret@proxy",
}
NEEDED = {
    "PATH": "/bin",
    "HOME": "/home/me",
    "LC_ALL": "C",
    "CUDA_VISIBLE_DEVICES": "0",
    "MKL_NUM_THREADS": "1",
    "HF_HOME": "/hf",
}


def test_no_secret_is_passed_on_and_what_computes_needs_is() -> None:
    made = child_environment(environment=SECRETS | NEEDED)
    assert made.keys() == {*NEEDED, "OMP_NUM_THREADS", "PYTHONPATH"}
    assert NEEDED.items() <= made.items()


@pytest.mark.parametrize(
    ("allowed", "name"),
    [
        ({"network": True}, "https_proxy"),
        ({"database": True}, "PGPASSWORD"),
        ({"more": ["HF_TOKEN"]}, "HF_TOKEN"),
    ],
)
def test_what_is_asked_for_is_passed_on_and_no_more(allowed: dict[str, object], name: str) -> None:
    made = child_environment(environment=SECRETS | NEEDED, **allowed)  # type: ignore[arg-type]  # one of three
    assert made.keys() & SECRETS.keys() == {name}


def test_what_commands_tell_libraries_reaches_their_children() -> None:
    assert LIBRARY_DEFAULTS.items() <= child_environment(environment=LIBRARY_DEFAULTS).items()
