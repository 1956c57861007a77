"""Lines that load a finished run's adapter: with `peft`, or where that cannot make the base, with ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpeft.models.loftq import STARTS
from fedpeft.models.methods import METHODS

_AUTO_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
}


def load_snippet(run: Mapping[str, Any], adapter: str = "adapter") -> str:
    """Python that loads base model and adapter, from the tables of a resolved run file.

    Args:
        run: the run file as nested tables; a missing key counts as its default.
        adapter: path of the adapter folder as the reader will type it.
    """
    model = run.get("model", {})
    path, auto = model.get("path", "embedded"), _AUTO_CLASSES.get(model.get("task", "causal-lm"), "AutoModel")
    labels = run.get("data", {}).get("labels") if model.get("task") == "sequence-classification" else None
    extra = f", num_labels={_label_count(labels)}" if labels else ""
    if _needs_our_base(run):
        return _with_our_base(model, adapter, extra)
    generates = auto == _AUTO_CLASSES["causal-lm"]
    names = f"{auto}, GenerationConfig" if generates else auto
    lines = ["from peft import PeftModel", f"from transformers import {names}"]
    base = repr(path)
    if path == "embedded":
        lines.insert(0, "from importlib.resources import files")
        base = 'str(files("fedpeft.data.embedded") / "model")'
    elif path.startswith("package:"):
        package, _, folder = path.removeprefix("package:").partition("/")
        lines.insert(0, "from importlib.resources import files")
        base = f"str(files({package!r}) / {folder!r})"
    return "\n".join(
        [
            *lines,
            f"base = {auto}.from_pretrained({base}{extra})",
            *(
                [f"base.generation_config = GenerationConfig.from_pretrained({adapter!r})"]
                if generates
                else []
            ),
            f"model = PeftModel.from_pretrained(base, {adapter!r})",
        ]
    )


def _needs_our_base(run: Mapping[str, Any]) -> bool:
    """Whether the adapter is one of this very quantised base: it begins at its codes, or is their scales."""
    peft = run.get("peft", {})
    method = METHODS.get(peft.get("method", "lora"))
    return peft.get("init_lora_weights") in STARTS or (method is not None and bool(method.needs_quantization))


def _with_our_base(model: Mapping[str, Any], adapter: str, extra: str) -> str:
    given = {key: value for key, value in model.items() if key != "device" and value not in (None, [], ())}
    section = ", ".join(f"{key}={value!r}" for key, value in given.items())
    return "\n".join(
        [
            "from pathlib import Path",
            "from fedpeft.config.sections import ModelSection",
            "from fedpeft.models.base_model import load_base",
            "from fedpeft.models.export import load_adapter",
            f"base = load_base(ModelSection({section}){extra})",
            f"model = load_adapter(base, Path({adapter!r}))",
        ]
    )


def _label_count(labels: Any) -> int:
    """A list names the labels in order; a table gives each value its number, several values may share one."""
    return len(set(labels.values())) if isinstance(labels, dict) else len(labels)
