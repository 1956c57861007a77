"""Record-level differential privacy on a client: DP-SGD over a proven set of PEFT methods."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from opacus import GradSampleModule
from torch import Tensor, nn

from fedpeft.config import TrainingSection
from fedpeft.data.collate import collate
from fedpeft.errors import PrivacyError
from fedpeft.privacy.clipping import check_clip_norm
from fedpeft.privacy.events import RecordLevel
from fedpeft.privacy.noise import NoiseSource, coins
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
    """

    max_grad_norm: float
    noise_multiplier: float
    sample_rate: float
    expected_batch_size: float

    def __post_init__(self) -> None:
        check_clip_norm(self.max_grad_norm)
        if not 0.0 < self.expected_batch_size < float("inf"):
            raise PrivacyError(
                f"expected_batch_size {self.expected_batch_size!r} came; a positive number is needed"
            )
        self.event(1)

    def event(self, steps: int) -> RecordLevel:
        """What so many steps release."""
        return RecordLevel(noise_multiplier=self.noise_multiplier, sample_rate=self.sample_rate, steps=steps)


@dataclass(frozen=True)
class PrivateReport:
    """What may be said of a private training: its steps and their cost. Losses and row counts may not."""

    steps: int
    event: RecordLevel


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
    common sequences, so a row is a record; one person's several rows are several records.

    Call `fedpeft.training.dp_allowed.check_allowed` when the run is prepared, and
    `fedpeft.training.dp_oracle.verify_per_example` once on each model: Opacus alone doesn't notice every
    mistake.

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1. The optimiser
        (momentum,
    Adam's moments, schedule, FedProx's pull) works on the noised gradient, which costs nothing more.

    Args:
        section: optimiser, learning rate and schedule; `batch_size` only bounds how many rows are computed at
            once.
        rng: seeds dropout, which needs no secrecy.
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
            batch = rows.indices[coins(source, mechanism.sample_rate, len(rows.indices))]
            _noised_gradient(hooked, optimizer, parameters, rows, _pieces(batch, section.batch_size))
            add_proximal_gradient(trained, start, proximal_mu)
            inner.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if on_step is not None:
                on_step(step + 1)
    return PrivateReport(steps, mechanism.event(steps))


def check_section(section: TrainingSection) -> None:
    """Refuse options of first-order training that private training cannot honour.

    Raises:
        PrivacyError: one of them is set.
    """
    refused = (
        (
            section.gradient_checkpointing,
            "gradient_checkpointing",
            "per-example gradients are lost; set it false",
        ),
        (
            section.precision != "fp32",
            "precision",
            "per-example gradients are proven in fp32 only; set 'fp32'",
        ),
        (
            section.max_grad_norm is not None,
            "max_grad_norm",
            "it bounds a whole batch's gradient; give the bound per example under privacy and remove it here",
        ),
        (
            section.gradient_accumulation != 1,
            "gradient_accumulation",
            "a private step is one Poisson batch; set 1 and choose the sample rate",
        ),
    )
    for wrong, key, why in refused:
        if wrong:
            raise PrivacyError(f"training.{key} cannot be used under record-level privacy: {why}")


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
