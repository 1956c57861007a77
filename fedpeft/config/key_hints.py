"""What was probably meant by a key that a run file does not have."""

from __future__ import annotations

import difflib
import functools
import typing
from collections.abc import Iterable, Iterator

from pydantic import BaseModel

from fedpeft.config.sections import RunConfig

ELSEWHERE: dict[str, str] = {
    "learning_rate": "training.lr",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "local_epochs": "training.epochs",
    "max_steps": "training.steps",
    "local_steps": "training.steps",
    "per_device_train_batch_size": "training.batch_size",
    "train_batch_size": "training.batch_size",
    "micro_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "lr_scheduler_type": "training.schedule",
    "lr_scheduler": "training.schedule",
    "warmup_ratio": "training.warmup_steps",
    "optim": "training.optimizer",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "per_device_eval_batch_size": "evaluation.batch_size",
    "eval_steps": "evaluation.every",
    "lora_r": "peft.r",
    "lora_rank": "peft.r",
    "rank": "peft.r",
    "lora_target_modules": "peft.target_modules",
    "peft_type": "peft.method",
    "model_name_or_path": "model.path",
    "model_name": "model.path",
    "base_model": "model.path",
    "pretrained_model_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "quantization_config": "model.quantization",
    "train_file": "data.train",
    "dataset_name": "data.train",
    "dataset": "data.train",
    "validation_file": "data.test",
    "test_file": "data.test",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "model_max_length": "data.max_length",
    "cutoff_len": "data.max_length",
    "val_set_size": "data.heldout",
    "num_rounds": "run.rounds",
    "num_server_rounds": "run.rounds",
    "num_clients": "data.partitioner.clients",
    "fraction_fit": "federation.sampling",
    "fraction_train": "federation.sampling",
}
"""Names that other trainers and frameworks give to keys of a run file."""

OPEN = ("peft.",)  # tables whose further keys are checked by what they name


def suggest_key(where: str) -> str:
    """Return "; did you mean ...?" for an unknown dotted key, or an empty text where nothing is near."""
    keys = list_known_keys()
    section, _, name = where.rpartition(".")
    if name in ELSEWHERE:
        return f"; did you mean {ELSEWHERE[name]}?"
    same = [key for key in keys if key.rpartition(".")[2] == name]
    if len(same) == 1:
        return f"; did you mean {same[0]}?"
    beside = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == section}
    near = difflib.get_close_matches(name, beside, n=1, cutoff=0.7)
    return f"; did you mean {beside[near[0]]}?" if near else ""


def suggest_option(name: str, section: str, known: Iterable[str]) -> str:
    """Return the option of an open table that was probably meant, or an empty text."""
    names = list(known)
    meant = ELSEWHERE.get(name, "").removeprefix(f"{section}.")
    return meant if meant in names else next(iter(difflib.get_close_matches(name, names, n=1)), "")


@functools.cache
def list_known_keys() -> tuple[str, ...]:
    """Return the dotted keys of a run file, tables included; those of list entries are left out."""
    return tuple(_keys_of(RunConfig, ""))


def _keys_of(model: type[BaseModel], before: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield before + name
        for part in _parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _keys_of(part, f"{before}{name}.")


def _parts(annotation: object) -> tuple[object, ...]:
    """Return a type and those it is a union of, but not what a sequence holds."""
    if typing.get_origin(annotation) in (tuple, list, dict):
        return ()
    inner = typing.get_args(annotation)
    return (annotation, *(part for each in inner for part in _parts(each)))
