"""`fedpeft export`."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedpeft.commands.adapters import model_with_adapter
from fedpeft.commands.arguments import adapter_and_run, adapter_folder
from fedpeft.config.sections import ModelSection
from fedpeft.errors import StateError, StorageError
from fedpeft.models.base_model import load_base, load_tokenizer
from fedpeft.models.comparison import bytes_of_copy, draw_token_rows, read_logits, refuse_difference
from fedpeft.models.device import available_memory
from fedpeft.models.export import CONFIG_FILE, adapter_digest, merge_adapter
from fedpeft.models.quiet import one_line, quiet
from fedpeft.runtime.files import folder_atomically, storage

_WRITTEN = (  # names of what a model, a tokenizer or an adapter is saved as
    "*config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.spm",
    "emulator*.json",
    "README.md",
)
_MARKS = (CONFIG_FILE, "config.json")  # an adapter's and a model's own file: what an export writes


def export_command(
    adapter: Path, out: Path, *, merge: bool, run_file: Path | None, overrides: Sequence[str], force: bool
) -> None:
    """Write an adapter, or base and adapter merged with the tokenizer, to `out`; whole or not at all.

    Args:
        adapter: an adapter folder or a run folder with one.
        out: the folder to write.
        merge: write the merged model; `run_file` and `overrides` say which base, else the run beside the
            adapter does.
        force: replace an earlier export in `out`.

    Raises:
        StateError: `out` is in the way.
        ModelError: no adapter there, one that does not fit, or one that cannot be merged.
        FedPEFTError: what else keeps the model from being loaded or written.
    """
    folder = adapter_folder(adapter)
    digest = adapter_digest(folder)
    check_out(out, folder, force=force)
    if merge:
        folder, run = adapter_and_run(adapter, run_file, overrides)
        tokenizer = load_tokenizer(run.model)
        model, labels = model_with_adapter(run, folder)
        write_merged(model, tokenizer, labels, out, run.model)
        print(f"merged model  {out}")
        return
    with storage(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with folder_atomically(out) as fresh:
        shutil.copytree(folder, fresh, dirs_exist_ok=True)
    print(f"adapter  {out}\nsha256   {digest}")


def check_out(out: Path, made_from: Path, *, force: bool, what: str = "the adapter") -> None:
    """Refuse to write over anything but an earlier export, and that only with `force`.

    Args:
        made_from: what must not be written over at all; `what` names it.

    Raises:
        StateError: saying what is in the way.
    """
    source, target = made_from.resolve(), out.resolve()
    if target == source or target in source.parents or source in target.parents:
        raise StateError(f"--out {out} holds {what} itself, or lies in it; choose a folder elsewhere")
    if not out.exists():
        return
    if not out.is_dir():
        raise StateError(f"--out {out} is a file; choose a folder")
    names = _names(out.iterdir())
    if not names:
        return
    others = sorted(path.name for path in out.iterdir() if path.is_dir() or not _is_from_export(path.name))
    if others or not names & set(_MARKS):
        named = f" ({', '.join(others[:3])})" if others else ""
        raise StateError(
            f"--out {out} holds other files than an export{named}, and --force replaces nothing else; choose"
            " an empty or a new folder"
        )
    if not force:
        raise StateError(f"--out {out} already holds a model; replace it with --force, or choose another")


def _is_from_export(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _WRITTEN)


def _names(paths: Iterable[Path]) -> set[str]:
    return {path.name for path in paths}


def write_merged(model: Any, tokenizer: Any, labels: Sequence[str], out: Path, section: ModelSection) -> None:
    """Fold what is trained into the base, and write a folder that `transformers` loads by itself.

    The folder is read back, and takes its place only if its model computes what base and adapter do.

    Args:
        section: what the base was loaded as.

    Raises:
        StorageError: it cannot be written.
        ModelError: the method cannot be merged, or the merged model computes something else.
    """
    rows = draw_token_rows(model)
    trained = read_logits(model, rows)
    merged: Any = merge_adapter(model)
    if labels:
        merged.config.id2label = dict(enumerate(labels))
        merged.config.label2id = {label: index for index, label in enumerate(labels)}
    with storage(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with folder_atomically(out) as fresh:
        try:
            with quiet():
                merged.save_pretrained(fresh)
                tokenizer.save_pretrained(fresh)
        except SafetensorError as error:
            raise StorageError(
                f"{out}: the model cannot be written ({one_line(error)}); free disk space and try again"
            ) from error
        _compare(fresh, merged, section, rows, trained)


def _compare(folder: Path, merged: Any, section: ModelSection, rows: Any, trained: Any) -> None:
    """Refuse a folder whose model isn't the trained one; say so where there is no memory to look."""
    if bytes_of_copy(merged) > available_memory():
        print("compared  no: another copy of the model doesn't fit in memory")
        return
    dtype = str(next(merged.parameters()).dtype).removeprefix("torch.")
    again = ModelSection(path=str(folder), task=section.task, dtype=dtype)
    labels = merged.config.num_labels if section.task == "sequence-classification" else None
    found = read_logits(load_base(again, num_labels=labels), rows)
    refuse_difference(
        merged, trained, found, what="the merged model", keep="nothing was written; keep base and adapter"
    )
