"""The hostile member's whole program, against a server and agents as people start them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.hostile.member import FORGERIES, TRESPASSES, trespass


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft calls it
def test_a_hostile_member_gains_nothing(tmp_path: Path) -> None:
    assert len(trespass(tmp_path).tried) >= len(FORGERIES) + len(TRESPASSES)
