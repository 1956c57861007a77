"""A token that was not copied whole is refused at once, whether a server answers or not."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fedpeft.errors import CredentialError
from fedpeft_client.transport.device_certificate import own_material

NOBODY = "127.0.0.1:1"


@pytest.mark.parametrize("token", ["nonsense", "fedpeft1.abc.def", "x" * 300])
def test_it_is_not_dialled_for(token: str, tmp_path: Path) -> None:
    with pytest.raises(CredentialError, match="copy it whole"):
        asyncio.run(own_material(tmp_path / "keys", NOBODY, token, patience_s=1e9))
    assert not (tmp_path / "keys").exists()
