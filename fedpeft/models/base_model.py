"""The frozen base model and its tokenizer: from a folder, the hub, or what ships with the package."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from fedpeft.config.sections import HUB_MODEL, OWN_MODEL, ModelSection
from fedpeft.errors import ModelError
from fedpeft.models.checkpoint_files import note_source
from fedpeft.models.generation import first_end_token, settle_end_tokens
from fedpeft.models.heads import outer_modules
from fedpeft.models.positions import usable_positions
from fedpeft.models.probing import refuse_leak
from fedpeft.models.quantization import (
    DTYPES,
    LEAN_FROM,
    lean_heap,
    quantization_config,
    settle_quantised,
)
from fedpeft.models.quiet import one_line, quiet

__all__ = [
    "Tokenizer",
    "head_modules",
    "load_base",
    "load_tokenizer",
    "model_path",
    "new_modules",
    "positions_of",
    "skeleton_of",
]

_AUTO_CLASSES = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PACKAGE = "package:"
_NEW_MODULES = "fedpeft_new_modules"


def model_path(section: ModelSection) -> str:
    """Return the folder or hub name that the section means.

    "embedded" is the folder inside this package, "package:NAME/FOLDER" one inside an installed package, and
    "hub:NAME" a name of the hub, also where a folder is called so.

    Raises:
        ModelError: `path` is neither an existing folder nor written like a hub name, or a package is
            missing.
    """
    if section.path == OWN_MODEL:
        raise ModelError(
            "the run's base model is a folder of its server; say where this device's copy lies: --model DIR,"
            " or model in client.toml"
        )
    if section.path.startswith(HUB_MODEL):
        return _hub_name(section.path.removeprefix(HUB_MODEL))
    if section.path.startswith(_PACKAGE):
        return _package_folder(section.path)
    if section.path == "embedded":
        # Imported here because only this name needs the embedded files.
        from fedpeft.data.embedded import model_folder

        return str(model_folder())
    folder = Path(section.path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists() or not _HUB_NAME.fullmatch(section.path):
        raise ModelError(
            f"model.path '{section.path}' is not a folder; give a Hugging Face model folder, a hub name "
            "(owner/name) or 'embedded'"
        )
    return section.path


def _hub_name(name: str) -> str:
    """Return a name for libraries that would take a folder of that name instead, where there is none."""
    if not _HUB_NAME.fullmatch(name):
        raise ModelError(f"model.path 'hub:{name}' is no name of the hub; write hub:OWNER/NAME")
    if Path(name).exists():
        raise ModelError(
            f"model.path 'hub:{name}' is of the hub, and '{name}' lies in the working folder too; start in"
            " another folder, or give the model's own"
        )
    return name


def _package_folder(path: str) -> str:
    """Return a folder inside an installed package, without importing the package."""
    name, _, inside = path.removeprefix(_PACKAGE).partition("/")
    found = find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ModelError(f"model.path '{path}' needs the Python package '{name}', which is not installed")
    folder = Path(found.submodule_search_locations[0]) / inside
    if not folder.is_dir():
        raise ModelError(f"model.path '{path}': the package has no folder '{inside}'")
    return str(folder)


def load_tokenizer(section: ModelSection) -> Tokenizer:
    """Load the tokenizer of the section's model, with a padding token in every case.

    A tokenizer without an end token takes the first that the model's generation settings name. One without a
    padding token pads with its end token, else with its unknown token.

    Raises:
        ModelError: no tokenizer there, or none of the three tokens.
    """
    path = model_path(section)
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=False, local_files_only=Path(path).is_dir()
            )
        except Exception as error:  # tokenizers raise bare Exception on broken files
            raise ModelError(_unloadable("tokenizer", section, path, error)) from error
        if tokenizer.eos_token_id is None and section.task == "causal-lm":
            end = first_end_token(path)
            if end is not None and end < len(tokenizer):
                tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"the tokenizer of model.path '{section.path}' has no padding, end-of-sequence or unknown token; "
            "add a pad_token to its tokenizer_config.json"
        )
    return tokenizer


def load_base(
    section: ModelSection,
    *,
    num_labels: int | None = None,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> nn.Module:
    """Load the base model on the CPU, in evaluation mode, with every parameter frozen.

    Weights that the task needs and the files lack (a new classification head, with BERT's pooler where that
    is missing) are drawn from `seed`, the same for every client; the global generator is left as it was. The
    padding token id is set in the config. Nothing is fetched unless `path` is a hub name, code that comes
    with a model is never run, and weights are read from safetensors files alone, never from pickles.

    Args:
        section: path, task, dtype and quantisation; see `fedpeft.models.quantization`.
        num_labels: number of classes; needed for sequence classification, and only there.
        seed: of the new weights.
        tokenizer: of the rows that the model is for, if there are any.

    Raises:
        ModelError: missing folder, broken files, an architecture without the task's model class, weights
            missing outside the head, layers that cannot be quantised as asked, tokens that the model has no
            embedding for, or a language model whose logits see later tokens.
        MissingExtraError: quantisation without `bitsandbytes`.
    """
    if (section.task == "sequence-classification") != (num_labels is not None):
        raise ModelError(
            f"num_labels is {num_labels} for task '{section.task}'; only classifiers take it, and must"
        )
    path = model_path(section)
    options: dict[str, Any] = {"dtype": DTYPES[section.dtype], "local_files_only": Path(path).is_dir()}
    if num_labels is not None:
        options |= {"num_labels": num_labels, "ignore_mismatched_sizes": True}
    if section.quantization != "none":
        lean_heap()
        options["quantization_config"] = quantization_config(
            section, lambda: skeleton_of(section, num_labels)
        )
        options["device_map"] = {"": "cpu"}  # by default a GPU would be taken, and codes not be everybody's
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            model, report = _AUTO_CLASSES[section.task].from_pretrained(
                path, output_loading_info=True, trust_remote_code=False, use_safetensors=True, **options
            )
        except ModelError:
            raise
        except Exception as error:  # torch, safetensors and json each raise their own kind on broken files
            raise ModelError(_unloadable(f"{section.task} model", section, path, error)) from error
    _note_new_modules(model, report, section)
    settle_quantised(model)
    if sum(parameter.numel() for parameter in model.parameters()) >= LEAN_FROM:
        lean_heap()
    note_source(model, path)
    model.requires_grad_(False)
    _settle_tokens(model, section)
    base: nn.Module = model.eval()
    if tokenizer is not None:
        _refuse_unknown_tokens(tokenizer, base, section)
        _refuse_unended_rows(tokenizer, base, section)
    if section.task == "causal-lm":
        refuse_leak(base, section.path)
    return base


def _settle_tokens(model: nn.Module, section: ModelSection) -> None:
    """Make the model's padding and end tokens those of its tokenizer."""
    config: Any = model.config
    if section.task == "sequence-classification" or config.pad_token_id is None:
        config.pad_token_id = load_tokenizer(section).pad_token_id
    if section.task == "causal-lm":
        try:
            tokenizer = load_tokenizer(section)
        except ModelError:  # a model without one has no rows; whoever reads rows for it is told
            return
        settle_end_tokens(model, tokenizer)


def skeleton_of(section: ModelSection, num_labels: int | None = None) -> nn.Module:
    """The model without its weights, for its names and shapes.

    Raises:
        ModelError: there is no configuration, or no such model class.
    """
    path = model_path(section)
    labels = {} if num_labels is None else {"num_labels": num_labels}
    with quiet(), torch.device("meta"):
        try:
            config = AutoConfig.from_pretrained(
                path, trust_remote_code=False, local_files_only=Path(path).is_dir(), **labels
            )
            kind = _AUTO_CLASSES[section.task]
            skeleton: nn.Module = kind.from_config(
                config, dtype=DTYPES[section.dtype], trust_remote_code=False
            )
        except Exception as error:  # broken files raise all kinds
            raise ModelError(_unloadable(f"{section.task} model", section, path, error)) from error
    return skeleton


def positions_of(section: ModelSection) -> int | None:
    """Return `usable_positions` of the section's model, from its configuration alone; no weights are read.

    Raises:
        ModelError: there is no configuration, or no such model class.
    """
    return usable_positions(skeleton_of(section))


def new_modules(base: nn.Module) -> tuple[str, ...]:
    """Return the dotted names of the modules that `load_base` drew because the files lack them, sorted."""
    return tuple(getattr(base, _NEW_MODULES, ()))


def head_modules(base: nn.Module) -> tuple[str, ...]:
    """Return the names of the classification head and of the other newly drawn modules, sorted."""
    return tuple(sorted({*outer_modules(base), *new_modules(base)}))


def _note_new_modules(model: nn.Module, report: dict[str, Any], section: ModelSection) -> None:
    """Record which modules were drawn; refuse a model whose body is incomplete."""
    absent = [str(key) for key in report.get("missing_keys", ())]
    absent += [str(row[0]) for row in report.get("mismatched_keys", ())]
    if not absent:
        return
    heads = outer_modules(model)
    names = sorted({_owner(key, heads) for key in absent})
    body = [name for name in names if name.rpartition(".")[0] and name.split(".")[0] not in heads]
    strangers = [name for name in body if "pooler" not in name]
    if section.task == "causal-lm" or strangers:
        listed = ", ".join((strangers or names)[:3])
        raise ModelError(
            f"model.path '{section.path}' lacks weights that a {section.task} model needs ({listed}); "
            "give the folder of a model trained for this task"
        )
    setattr(model, _NEW_MODULES, tuple(names))


def _refuse_unknown_tokens(tokenizer: Tokenizer, base: nn.Module, section: ModelSection) -> None:
    """Refuse a tokenizer that knows tokens for which the model has no embedding.

    Raises:
        ModelError: naming the first such token.
    """
    model: Any = base
    rows = int(model.get_input_embeddings().weight.shape[0])
    beyond = {index: token for token, index in tokenizer.get_vocab().items() if index >= rows}
    if beyond:
        first = min(beyond)
        raise ModelError(
            f"the tokenizer of model.path '{section.path}' has {len(beyond)} tokens beyond the {rows} rows of"
            f" the model's embedding (the first is {beyond[first]!r}, {first}); give the tokenizer that"
            " belongs to the model, or save the model with its embedding resized"
        )


def _refuse_unended_rows(tokenizer: Tokenizer, base: nn.Module, section: ModelSection) -> None:
    """Refuse a tokenizer without one end token a row, where a classifier reads off there (BART, T5).

    Raises:
        ModelError: rows end otherwise, or are padded with the end token.
    """
    config: Any = base.config
    if section.task != "sequence-classification" or not config.is_encoder_decoder:
        return
    ids = tokenizer("a")["input_ids"]
    if not ids or ids[-1] != config.eos_token_id or tokenizer.pad_token_id == config.eos_token_id:
        raise ModelError(
            f"a {config.model_type} classifies by the one end token of each row, and the tokenizer of"
            f" model.path '{section.path}' writes none or pads with it; give the one that belongs to it"
        )


def _owner(key: str, heads: tuple[str, ...]) -> str:
    """Name the module that is drawn as a whole: the head for anything inside it, else the parameter's own."""
    first = key.split(".")[0]
    return first if first in heads else key.rpartition(".")[0]


def _unloadable(what: str, section: ModelSection, path: str, error: BaseException) -> str:
    if isinstance(error, OSError) and not Path(path).is_dir():
        return (
            f"model.path '{section.path}' is no folder here and could not be fetched from the hub; check the "
            "name and the network, or give a folder"
        )
    return f"no {what} can be loaded from model.path '{section.path}': {one_line(error)}"
