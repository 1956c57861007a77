"""Record-level differential privacy on a client by back-propagation: DP-SGD, one row at a time.

Each drawn row goes through the model alone, with dropout that is seeded by the step and the row itself. What
it adds to a step's sum is then a function of the state and of that row, and one row more or less moves the
sum by that row's clipped gradient and nothing else: to the last bit, with dropout on, for every PEFT method
and every base whose model keeps nothing from one row to the next (`fedpeft.training.row_isolation` looks).

What was not chosen. Per-example gradients of a batch (Opacus's hooks, or `torch.func.vmap`) are faster for
models so small that a row alone leaves the processor idle: two to four times for rows of thirty tokens on one
core, a third for rows of a hundred. But dropout masks laid out over a batch give every row another mask when
one is missing, which moves the sum by many times the bound. Padding and the choice of kernels change the last
bits of every other row's gradient, which no clipping bounds, and a bound on that can only be a guess about
the model. And hooks see wrong gradients for many methods, or none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedpeft.config.sections import TrainingSection
from fedpeft.data.collate import collate
from fedpeft.errors import PrivacyError
from fedpeft.privacy.clipping import INWARD
from fedpeft.privacy.discrete_gaussian import discrete_gaussian
from fedpeft.privacy.events import PersonLevel, RecordLevel
from fedpeft.privacy.noise import NoiseSource
from fedpeft.runtime.cancellation import check_cancelled
from fedpeft.training.dp_losses import EXAMPLE_LOSSES
from fedpeft.training.first_order import (
    Rows,
    add_proximal_gradient,
    autocast,
    seed_generators,
    training_mode,
)
from fedpeft.training.optimizers import build_optimizer, build_schedule
from fedpeft.training.record_mechanism import RecordMechanism, draw_rows, row_number
from fedpeft.training.record_rules import section_problems

_BATCH_STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


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

    Source: Abadi et al. 2016, "Deep Learning with Differential Privacy", algorithm 1. The optimiser
        (momentum, Adam's moments, schedule, FedProx's pull) works on the noised gradient, which costs nothing
        more.

    Args:
        section: optimiser, learning rate and schedule; rows are computed one at a time, whatever its
            `batch_size`.
        rng: one number per step, the key of its rows' dropout and of the choice among a person's rows. It
            needs no secrecy, and how much is drawn of it does not depend on the rows.
        mechanism: the bound, the noise and the sampling.
        source: of the noise and of the sampling coins, which must be secret.

    Raises:
        PrivacyError: an option of `section` that private training cannot honour.
    """
    check_section(section)
    trained = list(parameters.values())
    start = [p.detach().clone() for p in trained] if proximal_mu else []
    optimizer = build_optimizer(section, trained)
    schedule = build_schedule(section, optimizer, steps)
    with private_mode(model, section):
        for step in range(steps):
            check_cancelled()
            key = int(rng.integers(2**63))
            drawn = draw_rows(rows, mechanism, source, key)
            total = sum_clipped(model, parameters, rows, drawn, section, mechanism, key)
            _set_noised_gradients(parameters, total, mechanism, source)
            add_proximal_gradient(trained, start, proximal_mu)
            optimizer.step()
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
    problems = section_problems(section)
    if problems:
        raise PrivacyError(problems[0])


@contextmanager
def private_mode(model: nn.Module, section: TrainingSection) -> Iterator[None]:
    """Training mode, without layers that normalise by (and keep) statistics over rows."""
    with training_mode(model, section, seed=0):  # each row seeds its own dropout
        for module in model.modules():
            if isinstance(module, _BATCH_STATISTICS):
                module.eval()
        yield


def sum_clipped(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    rows: Rows,
    drawn: NDArray[np.int64],
    section: TrainingSection,
    mechanism: RecordMechanism,
    step_key: int,
) -> dict[str, Tensor]:
    """Return the sum of the drawn rows' clipped gradients in the mechanism's quanta, int64 by parameter.

    Its value is the sum over `drawn` of a function of the parameters, the step's key and one row. A row whose
    gradient is not finite adds nothing: a refusal would tell about it.
    """
    total = {name: torch.zeros(p.shape, dtype=torch.int64, device=p.device) for name, p in parameters.items()}
    for index in drawn:
        gradients = row_gradient(model, parameters, rows, int(index), section, step_key)
        factor = clip_factor(gradients, mechanism.max_grad_norm)
        if factor == 0.0:
            continue
        scale = math.ldexp(factor, -mechanism.exponent)
        for name, gradient in gradients.items():
            total[name] += (gradient.double() * scale).round_().to(torch.int64)
    return total


def row_gradient(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    rows: Rows,
    index: int,
    section: TrainingSection,
    step_key: int,
) -> dict[str, Tensor]:
    """Return the gradient of one row's own mean loss; parameters that it doesn't touch are left out.

    Dropout, if the model is in `private_mode`, is seeded by the row and the step.
    """
    batch = collate(rows.encoded, np.array([index]), rows.pad_id, task=rows.task)
    device = next(iter(parameters.values())).device
    with seed_generators(device, row_number(rows.encoded, index, step_key)), autocast(section, device):
        logits = model(
            input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device)
        ).logits
    loss = EXAMPLE_LOSSES[rows.task](logits, batch.labels.to(device)).sum()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(parameters, found, strict=True) if gradient is not None}


def clip_factor(gradients: Mapping[str, Tensor], max_grad_norm: float) -> float:
    """Return what a row's gradient is multiplied by: at most 1, and 0 where it is not finite."""
    # float64, since float32 squares of large gradients overflow and would pass for infinite ones
    squares = [gradient.double().square().sum() for gradient in gradients.values()]
    norm = math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0  # read from the device once
    if not math.isfinite(norm):
        return 0.0
    return max_grad_norm * INWARD / norm if norm > max_grad_norm else 1.0


@torch.no_grad()
def _set_noised_gradients(
    parameters: Mapping[str, nn.Parameter],
    total: Mapping[str, Tensor],
    mechanism: RecordMechanism,
    source: NoiseSource,
) -> None:
    """Leave the noised sum over the expected batch size in each parameter's `grad`, in its dtype."""
    std = mechanism.noise_std(sum(parameter.numel() for parameter in parameters.values()))
    unit = math.ldexp(1.0, mechanism.exponent) / mechanism.expected_batch_size
    for name, parameter in parameters.items():
        noise = torch.from_numpy(discrete_gaussian(source, std, parameter.numel())).view(parameter.shape)
        parameter.grad = ((total[name].cpu() + noise).double() * unit).to(parameter)
