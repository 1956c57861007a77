"""`fedpeft emulator` and `fedpeft plug-in`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedpeft.commands.arguments import adapter_folder
from fedpeft.commands.export import check_out
from fedpeft.config.sections import ModelSection
from fedpeft.errors import ModelError, UsageError
from fedpeft.models.base_model import load_tokenizer, model_path
from fedpeft.models.distil import distil
from fedpeft.models.offsite import (
    NO_EMULATOR,
    Emulator,
    check_source,
    emulator_at,
    make_emulator,
    plug_in,
    save_emulator,
    whole_model,
)
from fedpeft.runtime.files import folder_atomically, storage
from fedpeft.runtime.randomness import stream


@dataclass(frozen=True)
class Distilling:
    """Steps of distillation, the file of public lines, and the seed of what is drawn."""

    steps: int
    text: Path
    seed: int


def emulator_command(
    base: str, out: Path, *, task: str, pad: int, middle: int, distilling: Distilling | None, force: bool
) -> None:
    """Write an emulator of a model, distilled if asked, as a model folder of its own; whole or not at all.

    Raises:
        UsageError: an unknown task, or a text that cannot be read.
        StateError: `out` is in the way.
        ModelError: the model cannot be loaded, or has too few layers.
    """
    if task not in ("causal-lm", "sequence-classification"):
        raise UsageError(f"--task {task!r}: use causal-lm or sequence-classification")
    section = ModelSection.model_validate({"path": base, "task": task})
    path = model_path(section)
    check_out(out, Path(path), force=force)
    torch.set_num_threads(1)  # the same bytes on every machine of a kind
    tokenizer = load_tokenizer(section)
    with storage(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with folder_atomically(out) as fresh:
        made = make_emulator(whole_model(path, task), fresh, path=path, pad=pad, middle=middle)
        tokenizer.save_pretrained(fresh)
        if distilling is not None:
            made = _distil(made, fresh, path, task, distilling)
    print(f"emulator  {out}")
    print(f"layers    {len(made.kept)} of {made.depth}: {', '.join(map(str, made.kept))}")
    print(f"trained   the first and last {made.pad}")


def _distil(emulator: Emulator, folder: Path, path: str, task: str, how: Distilling) -> Emulator:
    tokenizer = load_tokenizer(ModelSection.model_validate({"path": str(folder), "task": task}))
    try:
        text = how.text.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {how.text}: cannot be read as UTF-8 text ({error})") from error
    lines = [tokenizer(line)["input_ids"] for line in text if line.strip()]
    student = whole_model(str(folder), task)
    rng = stream(how.seed, "distil")
    first, last = distil(student, whole_model(path, task), emulator, lines, steps=how.steps, rng=rng)
    print(f"distilled {how.steps} steps, squared distance {first:.4g} to {last:.4g}")
    made = replace(emulator, distilled=how.steps)
    save_emulator(student, folder, made)
    return made


def plug_in_command(adapter: Path, emulator: Path, base: str, out: Path, *, force: bool) -> None:
    """Write an adapter that was trained on an emulator as one of the full model.

    Raises:
        ModelError: no emulator there, another full model, or an adapter that doesn't fit.
        StateError: `out` is in the way.
    """
    found = emulator_at(emulator)
    if found is None:
        raise ModelError(f"{emulator}: {NO_EMULATOR}")
    path = model_path(ModelSection(path=base))
    folder = adapter_folder(adapter)
    check_source(found, path)
    check_out(out, folder, force=force)
    with storage(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    with folder_atomically(out) as fresh:
        plug_in(folder, fresh, found, base_name=path)
    print(f"adapter  {out}, for {path}")
