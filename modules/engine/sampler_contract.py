"""What a sampler is given and what it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
"""`denoise(x, sigma) -> denoised`: (B, 4, h, w) float32 in and out, one level for all rows."""


class Noise(Protocol):
    """Random numbers of a run; each row has streams of its own."""

    def normal(self) -> Tensor:
        """The next N(0, 1) noise of each row's stream: (B, 4, h, w) float32."""

    def brownian(self, sigma: float, sigma_next: float) -> Tensor:
        """Movement of each row's Brownian path between two levels, scaled to variance 1."""


@dataclass(frozen=True, slots=True)
class SamplerStep:
    """A step in work: its first model evaluation is done, its remaining ones are not.

    Attributes:
        index: 0-based.
        sigma: noise level of `x`.
        denoised: (B, 4, h, w), the step's first estimate of the clean latents.
        x: (B, 4, h, w), noisy latents at the start of the step; valid until the generator goes on.
    """

    index: int
    sigma: float
    denoised: Tensor
    x: Tensor


SamplerRun = Generator[SamplerStep, None, Tensor]
"""Yields after each step's first model evaluation and returns the final latents (B, 4, h, w)."""


def slope(x: Tensor, sigma: float, denoised: Tensor) -> Tensor:
    """dx/dσ of the probability flow ODE (Karras et al. 2022, eq. 1)."""
    return (x - denoised) / sigma


def ancestral_levels(sigma: float, sigma_next: float) -> tuple[float, float]:
    """(σ_down, σ_up): step down to σ_down, then add noise of σ_up to arrive at σ_next."""
    sigma_up = min(sigma_next, math.sqrt(max(0.0, sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2)))
    return math.sqrt(max(0.0, sigma_next**2 - sigma_up**2)), sigma_up
