"""The global state that a worker held last, on the agent's disk by run: one that begins anew goes on from it.

Where states travel in steps, a worker without the state that they begin at cannot take them, and its agent's
update would be missing until a whole state has come. The file is a convenience: it is not flushed, and what a
power cut or a stranger does to it is found by the state's fingerprint before anything is trained.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedpeft.runtime.files import keep_newest, storage
from fedpeft_client.workers.start_cache import refuse_no_digest

_KEPT = 8  # files; each is as large as what its run trains
_SUFFIX = ".state"


@dataclass(frozen=True)
class ReplicaShelf:
    """One file for each run, named by the run's digest.

    Raises:
        StorageError: the folder cannot be read or written.
    """

    folder: Path

    def put(self, run_digest: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replace what is kept of a run; of other runs only the newest few stay."""
        refuse_no_digest(run_digest)
        path = self.folder / f"{run_digest}{_SUFFIX}"
        fresh = path.with_name(f".{path.name}")
        with storage(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            fresh.write_bytes(save(dict(arrays)))
            os.replace(fresh, path)
        keep_newest(self.folder, f"*{_SUFFIX}", _KEPT)

    def get(self, run_digest: str) -> Mapping[str, NDArray[Any]]:
        """What is kept of a run; empty if nothing is, or nothing that can be read."""
        refuse_no_digest(run_digest)
        path = self.folder / f"{run_digest}{_SUFFIX}"
        with storage(self.folder):
            if not path.is_file():
                return {}
            content = path.read_bytes()
        try:
            return dict(load(content))
        except SafetensorError:
            return {}
