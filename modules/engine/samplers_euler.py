"""Samplers of the Euler and Heun family, and those that start again from noise at each step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from modules.engine.sampler_contract import (
    Denoise,
    Noise,
    SamplerRun,
    SamplerStep,
    ancestral_levels,
    slope,
)
from modules.engine.sigmas import ModelSampling, karras_sigmas, training_alphas_cumprod

TCD_ETA = 0.3
RESTART_FROM, RESTART_TO = 0.1, 2.0


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """Euler's method on the probability flow ODE (Karras et al. 2022, algorithm 2 without churn)."""
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        denoised = denoise(x, sigma)
        yield SamplerStep(i, sigma, denoised, x)
        x = torch.add(x, slope(x, sigma, denoised), alpha=sigma_next - sigma)
    return x


def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """Euler steps below each level, then fresh noise up to it; also the DDPM posterior, step for step."""
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        denoised = denoise(x, sigma)
        yield SamplerStep(i, sigma, denoised, x)
        sigma_down, sigma_up = ancestral_levels(sigma, sigma_next)
        x = torch.add(x, slope(x, sigma, denoised), alpha=sigma_down - sigma)
        if sigma_next > 0:
            x.add_(noise.normal(), alpha=sigma_up)
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """Heun's second-order method (Karras et al. 2022, algorithm 1)."""
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        x = yield from _heun_step(denoise, x, i, sigma, sigma_next)
    return x


def heunpp2(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """Heun++: slopes of up to three levels ahead, weighted by those levels.

    The last step is Euler's and the one before it Heun's, whether the schedule ends at 0 or above.
    """
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        noise.normal()  # Unused, yet part of the published stream: a later stage continues behind it.
        denoised = denoise(x, sigma)
        yield SamplerStep(i, sigma, denoised, x)
        d = _heunpp2_slope(denoise, x, slope(x, sigma, denoised), levels[i : i + 4], levels[0])
        x = torch.add(x, d, alpha=sigma_next - sigma)
    return x


def _heunpp2_slope(denoise: Denoise, x: Tensor, d: Tensor, ahead: list[float], first: float) -> Tensor:
    """The slope of a step from x at ahead[0] to ahead[1]; d is the one at its start."""
    if len(ahead) == 2:
        return d
    sigma, sigma2, sigma3 = ahead[:3]
    x2 = torch.add(x, d, alpha=sigma2 - sigma)
    d2 = slope(x2, sigma2, denoise(x2, sigma2))
    if len(ahead) == 3:
        w2 = sigma2 / (2 * first)
        return (1 - w2) * d + w2 * d2
    x3 = torch.add(x2, d2, alpha=sigma3 - sigma2)
    d3 = slope(x3, sigma3, denoise(x3, sigma3))
    w2, w3 = sigma2 / (3 * first), sigma3 / (3 * first)
    return (1 - w2 - w3) * d + w2 * d2 + w3 * d3


def dpm_2(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """Midpoint method in ln σ, after DPM-Solver-2 (Lu et al. 2022, arXiv:2206.00927)."""
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        x = yield from _midpoint_step(denoise, x, i, sigma, sigma_next)
    return x


def dpm_2_ancestral(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """Midpoint steps below each level, then fresh noise up to it."""
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        sigma_down, sigma_up = ancestral_levels(sigma, sigma_next)
        x = yield from _midpoint_step(denoise, x, i, sigma, sigma_down)
        if sigma_next > 0:
            x.add_(noise.normal(), alpha=sigma_up)
    return x


def lcm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """Clean latents, then fresh noise: consistency sampling (Song et al. 2023, algorithm 1)."""
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        denoised = denoise(x, sigma)
        yield SamplerStep(i, sigma, denoised, x)
        x = torch.add(denoised, noise.normal(), alpha=sigma_next) if sigma_next > 0 else denoised
    return x


def tcd(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, model_sampling: ModelSampling) -> SamplerRun:
    """Trajectory consistency sampling with η = 0.3 (Zheng et al. 2024, arXiv:2402.19159, algorithm 2).

    A step yields the trajectory point it jumps to, in place of the clean latents.
    """
    alphas_cumprod = training_alphas_cumprod()
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        denoised = denoise(x, sigma)
        timestep = float(model_sampling.sigma_to_timestep(sigma_next)) if sigma_next > 0 else 0.0
        # A continuous model's timesteps may be negative; the trajectory ends at the first entry.
        alpha = float(alphas_cumprod[max(0, int((1 - TCD_ETA) * timestep))])
        point = torch.add(denoised * math.sqrt(alpha), slope(x, sigma, denoised), alpha=math.sqrt(1 - alpha))
        yield SamplerStep(i, sigma, point, x)
        x = point
        if sigma_next > 0:
            variance = max(0.0, sigma_next**2 + 1 - 1 / alpha)
            x = torch.add(point / math.sqrt(alpha), noise.normal(), alpha=math.sqrt(variance))
    return x


def restart(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """Heun steps that go back up to σ ≈ 2 with fresh noise (Xu et al. 2023, arXiv:2306.14878).

    The steps of the way back are taken from the schedule's own, so their number stays the same. Under 20
    steps it is plain Heun.
    """
    reached: float | None = None
    for i, (sigma, sigma_next) in enumerate(_restart_steps(sigmas)):
        if reached is not None and sigma > reached:
            x = torch.add(x, noise.normal(), alpha=math.sqrt(sigma**2 - reached**2))
        x = yield from _heun_step(denoise, x, i, sigma, sigma_next)
        reached = sigma_next
    return x


def _restart_steps(sigmas: Tensor) -> Iterator[tuple[float, float]]:
    """(σ, σ_next) of each step; a rising jump between two steps is a restart."""
    steps = len(sigmas) - 1
    levels: list[float] = sigmas.tolist()
    if steps < 20:
        yield from itertools.pairwise(levels)
        return
    length, times = (steps // 4, 2) if steps >= 36 else (9, 1)
    levels = karras_sigmas(steps - length * times, levels[-2], levels[0]).tolist()
    low = min(range(len(levels)), key=lambda i: abs(levels[i] - RESTART_FROM))
    high = min(range(len(levels)), key=lambda i: abs(levels[i] - RESTART_TO))
    for i, step in enumerate(itertools.pairwise(levels)):
        yield step
        if i + 1 == low and high < low:
            again = karras_sigmas(length + 1, levels[low], levels[high])[:-1].tolist()
            yield from list(itertools.pairwise(again)) * times


def _heun_step(
    denoise: Denoise, x: Tensor, index: int, sigma: float, sigma_next: float
) -> Generator[SamplerStep, None, Tensor]:
    denoised = denoise(x, sigma)
    yield SamplerStep(index, sigma, denoised, x)
    d = slope(x, sigma, denoised)
    dt = sigma_next - sigma
    if sigma_next == 0:
        return torch.add(x, d, alpha=dt)
    x2 = torch.add(x, d, alpha=dt)
    d2 = slope(x2, sigma_next, denoise(x2, sigma_next))
    return torch.add(x, d + d2, alpha=dt / 2)


def _midpoint_step(
    denoise: Denoise, x: Tensor, index: int, sigma: float, sigma_next: float
) -> Generator[SamplerStep, None, Tensor]:
    denoised = denoise(x, sigma)
    yield SamplerStep(index, sigma, denoised, x)
    d = slope(x, sigma, denoised)
    if sigma_next == 0:
        return torch.add(x, d, alpha=-sigma)
    sigma_mid = math.sqrt(sigma * sigma_next)
    x2 = torch.add(x, d, alpha=sigma_mid - sigma)
    d2 = slope(x2, sigma_mid, denoise(x2, sigma_mid))
    return torch.add(x, d2, alpha=sigma_next - sigma)
