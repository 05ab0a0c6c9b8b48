"""Guidance: how the model's answers to the prompt and to the negative prompt become one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

FILTER_RADIUS = 6
FILTER_SIGMA = 3.0
BAND_BYTES = 16 * 1024 * 1024
"""Size of one temporary of the sharpness filter; it holds about three at a time."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance with a milder start and a sharpening filter.

    Attributes:
        scale: weight of the prompt, ≥ 1; at 1 the negative prompt is not evaluated, and nothing else acts.
        adaptive_scale: weight that the start of the run mimics where it is below `scale`, ≥ 1.
        sharpness: share of detail, in thousandths, that is filtered out of the noise estimate for the
            prompt at the end of the run, ≥ 0; 0 does not run the filter.
    """

    scale: float
    adaptive_scale: float = math.inf
    sharpness: float = 0.0

    @property
    def is_neutral(self) -> bool:
        """Whether the answer to the prompt is taken as it is."""
        return math.isclose(self.scale, 1.0)

    def effective_scale(self, progress: float) -> float:
        """Weight of the prompt at `progress`: 0 at the start of the diffusion, 1 at its end."""
        if self.scale <= self.adaptive_scale:
            return self.scale
        return progress * self.scale + (1.0 - progress) * self.adaptive_scale

    def combined(self, x: Tensor, positive: Tensor, negative: Tensor, progress: float) -> Tensor:
        """The guided estimate of the clean latents.

        Ho & Salimans 2022 (arXiv:2207.12598), eq. 6, written for clean latents.

        Args:
            x: (B, 4, h, w) noisy latents.
            positive, negative: (B, 4, h, w) clean latents according to the prompt and the negative prompt.
            progress: 0 at the start of the diffusion, 1 at its end.
        """
        share = 0.001 * self.sharpness * progress
        if share != 0.0:
            error = x - positive
            positive = torch.sub(positive, anisotropic_filter(error, positive) - error, alpha=share)
        return torch.lerp(negative, positive, self.effective_scale(progress))


def anisotropic_filter(error: Tensor, guide: Tensor) -> Tensor:
    """`error` averaged over 13×13 neighbours, less over those that differ in the guide (joint bilateral).

    A neighbour's weight is exp(-½·(Σ_c |g_q - g_p|)² / 3²) times Gaussians of its distance, σ = 3 latent
    pixels; the guide g is normalised per picture to mean 0 and variance 1, and the border reflected.

    Args:
        error: (B, C, h, w) float32, what is filtered.
        guide: (B, C, h, w) float32, clean latents.
    Returns:
        (B, C, h, w). It works in bands of rows: memory does not grow with the picture's height.
    """
    height, width = error.shape[-2:]
    std, mean = torch.std_mean(guide, dim=(1, 2, 3), keepdim=True)
    guide = (guide - mean) / (std + 1e-5)
    # A border can reflect only what is there; latents under 7 wide repeat their edge instead.
    mode = "reflect" if min(height, width) > FILTER_RADIUS else "replicate"
    padding = (FILTER_RADIUS,) * 4
    error_windows = _windows(functional.pad(error, padding, mode=mode))
    guide_windows = _windows(functional.pad(guide, padding, mode=mode))
    log_space = _log_space_weights(error.device)
    row_bytes = 4 * error.shape[0] * log_space.numel() * width
    band = max(1, BAND_BYTES // row_bytes)
    out = torch.empty_like(error)
    for top in range(0, height, band):
        rows = slice(top, top + band)
        weight = _weights(guide_windows[..., rows, :], guide[:, :, rows], log_space)
        total = weight.sum((1, 2))
        for channel in range(error.shape[1]):
            weighted = (weight * error_windows[:, channel, :, :, rows]).sum((1, 2))
            torch.div(weighted, total, out=out[:, channel, rows])
    return out


def _windows(padded: Tensor) -> Tensor:
    """(B, C, 13, 13, h, w): the neighbours of every pixel, without a copy."""
    size = 2 * FILTER_RADIUS + 1
    return padded.unfold(2, size, 1).unfold(3, size, 1).permute(0, 1, 4, 5, 2, 3)


def _weights(windows: Tensor, centre: Tensor, log_space: Tensor) -> Tensor:
    """(B, 13, 13, rows, w) weights of the neighbours of every pixel of a band."""
    distance = (windows[:, 0] - centre[:, 0, None, None]).abs_()
    for channel in range(1, centre.shape[1]):
        distance += (windows[:, channel] - centre[:, channel, None, None]).abs_()
    return torch.addcmul(log_space, distance, distance, value=-0.5 / FILTER_SIGMA**2).exp_()


def _log_space_weights(device: torch.device) -> Tensor:
    """(13, 13, 1, 1): logarithm of the outer product of two Gaussians that sum to 1."""
    offsets = torch.arange(-FILTER_RADIUS, FILTER_RADIUS + 1, dtype=torch.float32)
    line = torch.log_softmax(-0.5 * (offsets / FILTER_SIGMA) ** 2, dim=0)
    return (line[:, None] + line[None, :])[..., None, None].to(device)
