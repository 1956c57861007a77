"""The data and the model that work without a download: what a run file without paths uses.

The model is a byte-level causal language model of 0.8 million parameters, pretrained on the public rows of
`fedpeft.data.embedded.corpus` by `simulations/pretrain_embedded.py`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fedpeft.data.embedded.corpus import Row, make_federated_rows, pretraining_rows
from fedpeft.errors import ModelError

__all__ = ["Row", "make_federated_rows", "model_folder", "pretraining_rows", "verify_folder"]

WEIGHTS_FILE = "model.safetensors"
DIGEST_FILE = "digest.json"


def model_folder() -> Path:
    """The folder of the embedded model, in the layout that `transformers` loads, with its digest checked.

    Raises:
        ModelError: The weights are missing or are not the ones that were shipped.
    """
    return verify_folder(Path(__file__).parent / "model")


def verify_folder(folder: Path) -> Path:
    """`folder` itself, after the sha256 of its weights was found equal to the one in its `digest.json`.

    Raises:
        ModelError: A file is missing or unreadable, or the digest differs.
    """
    try:
        expected = json.loads((folder / DIGEST_FILE).read_text(encoding="utf-8"))[WEIGHTS_FILE]
        found = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".replace("\n", " ")
        raise ModelError(
            f"the model in {folder} cannot be checked ({reason}): reinstall the package"
        ) from error
    if found != expected:
        raise ModelError(
            f"{folder / WEIGHTS_FILE} has sha256 {found}, but {DIGEST_FILE} says {expected}: "
            "reinstall the package"
        )
    return folder
