"""What an adapter folder says of itself: its base, and the run that made it; no path of a machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from fedpeft.config.sections import HUB_MODEL, ModelSection, RunConfig
from fedpeft.models.base_model import Tokenizer
from fedpeft.models.quiet import quiet

CARD_FILE = "README.md"
_PATHS = ("name_or_path", "tokenizer_file", "vocab_file", "added_tokens_file", "special_tokens_map_file")


def public_name(section: ModelSection) -> str:
    """Return what others may know a base by: its hub or package name, or the last part of a folder's path."""
    path = section.path
    if path.startswith(HUB_MODEL):
        return path.removeprefix(HUB_MODEL)
    folder = Path(path).expanduser()
    return folder.resolve().name if folder.is_dir() or PurePath(path).is_absolute() else path


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer that the rows were read with, without the paths that it remembers."""
    with quiet():
        tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: value for key, value in settings.items() if key not in _PATHS}
        file.write_text(
            json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def write_card(folder: Path, run: RunConfig, *, digest: str, base_digest: str, round_: int) -> None:
    """Write a model card in the hub's form.

    Args:
        digest: the run's.
        base_digest: of everything frozen.
        round_: the last round whose change is in the adapter.
    """
    base = public_name(run.model)
    head = {
        **({"base_model": base} if "/" in base and not base.startswith("package:") else {}),
        "library_name": "peft",
        "tags": ["federated-learning", "fedpeft", run.peft.method],
    }
    lines = [f"{key}: {json.dumps(value)}" for key, value in head.items()]
    facts = {
        "run": f"{run.run.name}, digest `{digest}`",
        "base model": f"`{base}`, digest of what is frozen `{base_digest}`",
        "task": run.model.task,
        "held as": run.model.dtype if run.model.quantization == "none" else run.model.quantization,
        "method": f"{run.peft.method}{_options(run.peft.options)}",
        "rounds": f"{round_} of {run.run.rounds}, strategy {run.federation.strategy.kind}",
        "what travelled": ", ".join([run.space.kind, *(stage.kind for stage in run.stages)]),
        "differential privacy": "none" if run.privacy is None else run.privacy.kind,
    }
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    text = "\n".join(
        [
            "---",
            *lines,
            "---",
            "",
            f"# {run.run.name}",
            "",
            "An adapter that clients trained together; their rows stayed with them."
            " `peft.PeftModel.from_pretrained` puts it on its base.",
            "",
            "| | |",
            "| --- | --- |",
            table,
            "",
        ]
    )
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _options(options: Mapping[str, Any]) -> str:
    shown = [f"{key} {json.dumps(value)}" for key, value in sorted(options.items())]
    return f" ({', '.join(shown)})" if shown else ""


def _cell(text: str) -> str:
    """Keep a value in its cell, whatever it holds."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
