"""Clipped sums of per-example gradients on an integer grid, with exact noise.

Opacus adds floats to floats; its own remedy needs a package that cannot be had. Here each example's clipped
gradient is rounded to whole quanta, so that sums are exact, the noise is whole numbers from a `NoiseSource`,
and the sensitivity prices the rounding.
"""

from __future__ import annotations

import math

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from fedpeft.errors import PrivacyError
from fedpeft.privacy.central import sensitivity_quanta
from fedpeft.privacy.clipping import INWARD, check_clip_norm
from fedpeft.privacy.discrete_gaussian import discrete_gaussian
from fedpeft.privacy.noise import NoiseSource

GRID_BITS = 30  # quanta per max_grad_norm, as a power of two
MAX_EXAMPLES = 1 << 22  # per step: sums of so many clipped gradients are exact whole numbers in float64


class ExactNoiseOptimizer(DPOptimizer):  # type: ignore[misc]  # Opacus is untyped
    """Opacus's optimiser with exact clipping sums and noise; see `DPOptimizer` for the order of a step.

    Source: Abadi et al. 2016, algorithm 1; Canonne, Kamath, Steinke 2020 for the noise.

    `summed_grad` holds whole numbers (float64) in quanta of ``2**exponent``; `grad` is the noised sum over
    the *expected* batch size in the parameter's dtype. An example whose gradient is not finite adds nothing:
    a refusal would tell about it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        noise_multiplier: float,
        max_grad_norm: float,
        expected_batch_size: float,
        source: NoiseSource,
    ) -> None:
        check_clip_norm(max_grad_norm)
        super().__init__(
            optimizer,
            noise_multiplier=noise_multiplier,
            max_grad_norm=max_grad_norm,
            expected_batch_size=expected_batch_size,
        )
        self.source = source
        self.exponent = math.frexp(max_grad_norm)[1] - GRID_BITS
        size = sum(p.numel() for p in self.params)
        self.noise_quanta = noise_multiplier * sensitivity_quanta(max_grad_norm, self.exponent, size)
        self._examples = 0

    @torch.no_grad()
    def clip_and_accumulate(self) -> None:
        """Add this batch's clipped gradients, in quanta, to `summed_grad`."""
        samples = self.grad_samples
        self._count(len(samples[0]))
        factors = clip_factors(samples, self.max_grad_norm)
        for parameter, sample in zip(self.params, samples, strict=True):
            finite = factors > 0
            scaled = sample[finite].double() * _columns(
                math.ldexp(1.0, -self.exponent) * factors[finite], sample
            )
            total = scaled.round_().sum(dim=0)
            held = parameter.summed_grad
            parameter.summed_grad = total if held is None else held + total

    @torch.no_grad()
    def add_noise(self) -> None:
        """Add whole-number noise from the source and go back to the parameter's unit and dtype."""
        for parameter in self.params:
            noise = discrete_gaussian(self.source, self.noise_quanta, parameter.numel())
            whole = torch.from_numpy(noise).view(parameter.shape)
            # Below 2**53 quanta the sum is exact; what rounding lies beyond comes after the noise.
            noised = parameter.summed_grad.cpu().to(torch.int64) + whole
            parameter.grad = (noised.double() * math.ldexp(1.0, self.exponent)).to(parameter)
        self._examples = 0

    def _count(self, examples: int) -> None:
        self._examples += examples
        if self._examples > MAX_EXAMPLES:
            raise PrivacyError(
                f"{self._examples} examples came into one step and its sum is exact for {MAX_EXAMPLES};"
                " lower the sample rate"
            )


def clip_factors(samples: list[Tensor], max_grad_norm: float) -> Tensor:
    """What each example's gradient is multiplied by, float64[B]: at most 1, and 0 where it is not finite.

    Args:
        samples: per parameter [B, ...].
    """
    # [B]; float64, since float32 squares of large gradients overflow and would pass for infinite ones
    squared = sum(s.double().reshape(len(s), math.prod(s.shape[1:])).square().sum(dim=1) for s in samples)
    norms = torch.as_tensor(squared).sqrt()
    factors = torch.where(norms > max_grad_norm, max_grad_norm * INWARD / norms, torch.ones_like(norms))
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(norms))


def _columns(factors: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to multiply `like`'s examples."""
    return factors.view(-1, *(1,) * (like.dim() - 1))
