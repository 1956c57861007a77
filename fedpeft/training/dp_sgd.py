"""Record-level differential privacy on a client: DP-SGD over a proven set of PEFT methods."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from opacus import GradSampleModule
from torch import Tensor, nn

from fedpeft.config import TrainingSection
from fedpeft.data.collate import collate
from fedpeft.errors import PrivacyError
from fedpeft.interruption import go_on
from fedpeft.privacy.clipping import check_clip_norm
from fedpeft.privacy.events import PersonLevel, RecordLevel
from fedpeft.privacy.noise import NoiseSource, coins
from fedpeft.training.dp_allowed import section_problems
from fedpeft.training.dp_losses import EXAMPLE_LOSSES
from fedpeft.training.dp_optimizer import ExactNoiseOptimizer
from fedpeft.training.first_order import Rows, add_proximal_gradient, training_mode
from fedpeft.training.optimizers import build_optimizer, build_schedule


@dataclass(frozen=True, kw_only=True)
class RecordMechanism:
    """What a client promises about each of its rows; every number is public, and chosen without their help.

    Attributes:
        max_grad_norm: bound on each example's gradient, over all trained tensors together.
        noise_multiplier: noise's standard deviation over `max_grad_norm`.
        sample_rate: each row's chance to enter a step.
        expected_batch_size: what noised sums are divided by. Sample rate times the number of rows, where that
            number may be known; else any public guess of it.
        unit: what is protected and sampled. A person enters a step by one coin, with one of his rows.
    """

    max_grad_norm: float
    noise_multiplier: float
    sample_rate: float
    expected_batch_size: float
    unit: Literal["record", "person"] = "record"

    def __post_init__(self) -> None:
        check_clip_norm(self.max_grad_norm)
        if not 0.0 < self.expected_batch_size < float("inf"):
            raise PrivacyError(
                f"expected_batch_size {self.expected_batch_size!r} came; a positive number is needed"
            )
        self.event(1)

    def event(self, steps: int) -> RecordLevel | PersonLevel:
        """What so many steps release."""
        unit = RecordLevel if self.unit == "record" else PersonLevel
        return unit(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=steps)


@dataclass(frozen=True)
class PrivateReport:
    """What may be said of a private training: its steps and their cost. Losses and row counts may not."""

    steps: int
    event: RecordLevel | PersonLevel


def train(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    rows: Rows,
    section: TrainingSection,
    *,
    steps: int,
    rng: np.random.Generator,
    mechanism: RecordMechanism,
    source: NoiseSource,
    proximal_mu: float = 0.0,
    on_step: Callable[[int], None] | None = None,
) -> PrivateReport:
    """Train `parameters` in place for `steps` noised steps; the protected unit is a row of `rows`.

    Each step takes every row by its own coin (Poisson sampling; a step may be empty and is noise alone),
    clips each row's gradient, adds noise and divides by the expected batch size. Rows are never packed into
    common sequences, so a row is a record; one person's several rows are several records, unless the
    mechanism's unit is the person.

    Call `fedpeft.training.dp_allowed.check_allowed` when the run is prepared, and
    `fedpeft.training.dp_oracle.verify_per_example` once on each model: Opacus alone doesn't notice every
    mistake.

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1. The optimiser
        (momentum,
    Adam's moments, schedule, FedProx's pull) works on the noised gradient, which costs nothing more.

    Args:
        section: optimiser, learning rate and schedule; `batch_size` only bounds how many rows are computed at
            once.
        rng: seeds dropout and picks which of a person's rows serves, neither of which needs secrecy.
        mechanism: the bound, the noise and the sampling.
        source: of the noise and of the sampling coins, which must be secret too.

    Raises:
        PrivacyError: gradient checkpointing, mixed precision or a second clipping norm in `section`, or a
            model whose per-example gradients are missing.
    """
    check_section(section)
    trained = list(parameters.values())
    start = [p.detach().clone() for p in trained] if proximal_mu else []
    inner = build_optimizer(section, trained)
    schedule = build_schedule(section, inner, steps)
    optimizer = ExactNoiseOptimizer(
        inner,
        noise_multiplier=mechanism.noise_multiplier,
        max_grad_norm=mechanism.max_grad_norm,
        expected_batch_size=mechanism.expected_batch_size,
        source=source,
    )
    with per_example(model, parameters) as hooked, training_mode(model, section, int(rng.integers(2**62))):
        for step in range(steps):
            go_on()
            batch = drawn_rows(rows, mechanism, source, rng)
            _noised_gradient(hooked, optimizer, parameters, rows, _pieces(batch, section.batch_size))
            add_proximal_gradient(trained, start, proximal_mu)
            inner.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if on_step is not None:
                on_step(step + 1)
    return PrivateReport(steps, mechanism.event(steps))


def drawn_rows(
    rows: Rows, mechanism: RecordMechanism, source: NoiseSource, rng: np.random.Generator
) -> NDArray[np.int64]:
    """The rows of one step, int64[B]: those whose own coin shows heads, or one row of each such person.

    A person's one row is bounded as a record is, so that whoever is added or removed moves the clipped sum by
    at most the bound, with the probability that the coin has.

    Raises:
        PrivacyError: persons are protected and the rows don't say whose they are.
    """
    if mechanism.unit == "record":
        return rows.indices[coins(source, mechanism.sample_rate, len(rows.indices))]
    if rows.encoded.users is None:
        raise PrivacyError("persons are to be protected and the rows don't say whose they are; set data.user")
    shuffled = rng.permutation(rows.indices)
    _, first = np.unique(rows.encoded.users[shuffled], return_index=True)  # the first of each, hence any
    return np.sort(shuffled[first[coins(source, mechanism.sample_rate, len(first))]])


def check_section(section: TrainingSection) -> None:
    """Refuse options of first-order training that private training cannot honour.

    Raises:
        PrivacyError: one of them is set.
    """
    problems = section_problems(section)
    if problems:
        raise PrivacyError(problems[0])


@contextmanager
def per_example(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[nn.Module]:
    """The model with Opacus's hooks, which leave [B, ...] gradients in each parameter's `grad_sample`.

    Raises:
        PrivacyError: a trained layer that Opacus cannot hook.
    """
    try:
        hooked = GradSampleModule(model, strict=True, loss_reduction="sum")
    except NotImplementedError as error:
        raise PrivacyError(
            f"record-level privacy: a trained layer keeps buffers, which are not private ({len(error.args)}"
            " such); choose another peft.method"
        ) from error
    try:
        yield hooked
    finally:
        hooked.remove_hooks()
        for parameter in model.parameters():
            for name in ("grad_sample", "summed_grad", "_forward_counter", "_current_grad_sample"):
                if hasattr(parameter, name):
                    delattr(parameter, name)
            parameter.grad = None if parameter.requires_grad else parameter.grad


def _noised_gradient(
    model: nn.Module,
    optimizer: ExactNoiseOptimizer,
    parameters: Mapping[str, nn.Parameter],
    rows: Rows,
    pieces: Sequence[NDArray[np.int64]],
) -> None:
    """Leave the noised mean gradient of all pieces together in each parameter's `grad`."""
    for place, piece in enumerate(pieces):
        last = place == len(pieces) - 1
        optimizer.signal_skip_step(do_skip=not last)
        example_gradients(model, parameters, rows, piece)
        optimizer.pre_step()
        if not last:
            optimizer.zero_grad(set_to_none=True)


def example_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], rows: Rows, indices: NDArray[np.int64]
) -> dict[str, Tensor]:
    """The gradient of each example's own loss, by parameter name, [B, ...]; also left in `grad_sample`.

    Raises:
        PrivacyError: a parameter got none, or one of another shape.
    """
    if len(indices):
        batch = collate(rows.encoded, indices, rows.pad_id, task=rows.task)
        device = next(iter(parameters.values())).device
        logits = model(
            input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device)
        ).logits
        losses = EXAMPLE_LOSSES[rows.task](logits, batch.labels.to(device))
        with warnings.catch_warnings():
            # The first trained layer reads frozen embeddings; its outputs' gradients are what Opacus needs.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses.sum().backward()  # type: ignore[no-untyped-call]  # torch annotates it so
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if not len(indices):
            parameter.grad_sample = parameter.new_zeros(0, *parameter.shape)  # type: ignore[attr-defined]
        sample = getattr(parameter, "grad_sample", None)
        if not isinstance(sample, Tensor) or sample.shape != (len(indices), *parameter.shape):
            came = tuple(sample.shape) if isinstance(sample, Tensor) else "none"
            raise PrivacyError(
                f"record-level privacy: '{name}' of shape {tuple(parameter.shape)} got per-example"
                f" gradients of shape {came} for {len(indices)} examples; choose another peft.method"
            )
        found[name] = sample
    return found


def _pieces(batch: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """The batch in physical pieces; an empty batch is one empty piece."""
    return [batch[begin : begin + size] for begin in range(0, max(len(batch), 1), size)]
