"""Loading what can be loaded, and noting every reason why something cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from fedpeft.config.sections import RunConfig
from fedpeft.data.federated import FederatedData, encode
from fedpeft.data.run_tables import read_tables
from fedpeft.errors import FedPEFTError, RunFileError
from fedpeft.models.attach import attach
from fedpeft.models.base_model import load_base, load_tokenizer
from fedpeft.models.device import available_memory
from fedpeft.models.options import peft_problems
from fedpeft.participant.row_length import refuse_long_rows
from fedpeft.planning.memory_admission import refuse_oversized
from fedpeft.runtime.randomness import derive_seed

Result = TypeVar("Result")


@dataclass(frozen=True)
class Loaded:
    """Rows as tokens, and the base model with the adapter attached."""

    data: FederatedData
    model: nn.Module


class Problems:
    """Problems as they are found, each once and on one line."""

    def __init__(self) -> None:
        self._lines: dict[str, None] = {}

    def add(self, *lines: str) -> None:
        """Note some."""
        self._lines.update(dict.fromkeys(" ".join(line.split()) for line in lines))

    def attempt(self, step: Callable[[], Result]) -> Result | None:
        """The step's result; None if it failed with an error of ours, which is noted."""
        try:
            return step()
        except RunFileError as error:
            self.add(*error.problems)
        except FedPEFTError as error:
            self.add(str(error))
        return None

    @property
    def lines(self) -> tuple[str, ...]:
        """All of them, in the order they were found."""
        return tuple(self._lines)


def load(run: RunConfig, problems: Problems) -> tuple[FederatedData | None, nn.Module | None]:
    """Rows and model of a run, each None if it cannot be had; what a simulation loads.

    The model of a classifier needs the labels, so without its rows it is not tried; nor is one that this
    machine has no memory for.
    """
    task, seed = run.model.task, run.run.seed
    raw = problems.attempt(lambda: read_tables(run.data, task, seed, hides_rows=run.hides_rows))
    tokenizer = problems.attempt(lambda: load_tokenizer(run.model))
    data = None
    if raw is not None and tokenizer is not None:
        data = problems.attempt(lambda: encode(raw, tokenizer, run.data, task, hides_rows=run.hides_rows))
    if task == "sequence-classification" and raw is None:
        return data, None
    if data is not None and not problems.attempt(lambda: _fits(run, data)):
        return data, None
    labels = raw.num_labels if raw is not None else None
    head = derive_seed(seed, "head")
    base = problems.attempt(lambda: load_base(run.model, num_labels=labels, seed=head, tokenizer=tokenizer))
    if base is not None:
        problems.attempt(lambda: refuse_long_rows(run, run.peft, base))
    if base is None or peft_problems(run.peft, task):  # which are noted already
        return data, None
    model = problems.attempt(lambda: attach(base, run.peft, task=task, seed=derive_seed(seed, "adapter")))
    return data, model


def _fits(run: RunConfig, data: FederatedData) -> bool:
    refuse_oversized(run, data, limit=available_memory())
    return True


def read_rows(run: RunConfig) -> FederatedData:
    """The rows of a run as tokens; no weight is read.

    Raises:
        DataError, ModelError: what cannot be read.
    """
    raw = read_tables(run.data, run.model.task, run.run.seed, hides_rows=run.hides_rows)
    return encode(raw, load_tokenizer(run.model), run.data, run.model.task, hides_rows=run.hides_rows)
