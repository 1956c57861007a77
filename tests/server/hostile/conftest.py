"""Scenes that the cases share: each attacker has a name, and each run a journal, of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.hostile.scene import Scene, scene


@pytest.fixture(scope="package")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("plain"), "plain") as made:
        yield made


@pytest.fixture(scope="package")
def ternary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with scene(tmp_path_factory.mktemp("ternary"), "ternary") as made:
        yield made


@pytest.fixture(scope="package")
def undisturbed(plain: Scene) -> str:
    """The last state's digest of a run that nobody attacks."""
    return plain.hold()


@pytest.fixture(scope="package")
def undisturbed_ternary(ternary: Scene) -> str:
    return ternary.hold()
