"""DPM-Solver++ samplers: exponential integrators of the clean latents, with and without noise."""

from __future__ import annotations

import itertools
import math

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


def dpmpp_2s_ancestral(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """Second-order single-step DPM-Solver++ below each level, then fresh noise up to it."""
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        denoised = denoise(x, sigma)
        yield SamplerStep(i, sigma, denoised, x)
        sigma_down, sigma_up = ancestral_levels(sigma, sigma_next)
        if sigma_down == 0:
            x = torch.add(x, slope(x, sigma, denoised), alpha=-sigma)
        else:
            h = math.log(sigma / sigma_down)
            sigma_mid = math.sqrt(sigma * sigma_down)
            x2 = _toward(x, denoised, sigma_mid / sigma, h / 2)
            x = _toward(x, denoise(x2, sigma_mid), sigma_down / sigma, h)
        if sigma_next > 0:
            x.add_(noise.normal(), alpha=sigma_up)
    return x


def dpmpp_sde(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """Stochastic DPM-Solver++ with a midpoint, r = 1/2 (Lu et al. 2022, arXiv:2211.01095)."""
    levels = sigmas.tolist()
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        denoised = denoise(x, sigma)
        yield SamplerStep(i, sigma, denoised, x)
        if sigma_next == 0:
            x = torch.add(x, slope(x, sigma, denoised), alpha=-sigma)
            continue
        sigma_mid = _geometric_mean(sigmas[i], sigmas[i + 1])
        down, up = ancestral_levels(sigma, sigma_mid)
        x2 = torch.lerp(denoised, x, down / sigma).add_(noise.brownian(sigma, sigma_mid), alpha=up)
        denoised2 = denoise(x2, sigma_mid)
        down, up = ancestral_levels(sigma, sigma_next)
        x = torch.lerp(denoised2, x, down / sigma).add_(noise.brownian(sigma, sigma_next), alpha=up)
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """Second-order multistep DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095, algorithm 2)."""
    levels = sigmas.tolist()
    previous: Tensor | None = None
    h_previous = 0.0
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        denoised = denoise(x, sigma)
        yield SamplerStep(i, sigma, denoised, x)
        h = math.log(sigma / sigma_next) if sigma_next > 0 else math.inf
        ahead = denoised
        if previous is not None and sigma_next > 0:
            ahead = torch.lerp(denoised, previous, -h / (2 * h_previous))
        x = _toward(x, ahead, sigma_next / sigma, h)
        previous, h_previous = denoised, h
    return x


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """Stochastic second-order multistep DPM-Solver++, midpoint form."""
    levels = sigmas.tolist()
    previous: Tensor | None = None
    h_previous = 0.0
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        denoised = denoise(x, sigma)
        yield SamplerStep(i, sigma, denoised, x)
        if sigma_next == 0:
            return denoised
        h = math.log(sigma / sigma_next)
        gain = -math.expm1(-2 * h)
        x = _toward(x, denoised, sigma_next / sigma * math.exp(-h), 2 * h)
        if previous is not None:
            x.add_(denoised - previous, alpha=0.5 * gain * h / h_previous)
        x.add_(noise.brownian(sigma, sigma_next), alpha=sigma_next * math.sqrt(gain))
        previous, h_previous = denoised, h
    return x


def dpmpp_3m_sde(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """Stochastic third-order multistep DPM-Solver++."""
    levels = sigmas.tolist()
    history: list[tuple[Tensor, float]] = []
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        denoised = denoise(x, sigma)
        yield SamplerStep(i, sigma, denoised, x)
        if sigma_next == 0:
            return denoised
        h = math.log(sigma / sigma_next)
        gain = -math.expm1(-2 * h)
        # exp(-2h) and not σ_next/σ·exp(-h), which is the same: the published form in each sampler.
        x = _toward(x, denoised, math.exp(-2 * h), 2 * h)
        _add_higher_orders(x, denoised, h, history)
        x.add_(noise.brownian(sigma, sigma_next), alpha=sigma_next * math.sqrt(gain))
        history = [(denoised, h), *history[:1]]
    return x


def _add_higher_orders(x: Tensor, denoised: Tensor, h: float, history: list[tuple[Tensor, float]]) -> None:
    """Add the derivative terms of the third-order formula to x; history holds (denoised, h), newest first."""
    if not history:
        return
    phi_2 = math.expm1(-2 * h) / (2 * h) + 1
    phi_3 = phi_2 / (2 * h) - 0.5
    (denoised1, h1), *older = history
    r0 = h1 / h
    change = (denoised - denoised1) / r0
    if not older:
        x.add_(change, alpha=phi_2)
        return
    denoised2, h2 = older[0]
    r1 = h2 / h
    bend = change - (denoised1 - denoised2) / r1
    x.add_(torch.add(change, bend, alpha=r0 / (r0 + r1)), alpha=phi_2)
    x.sub_(bend, alpha=phi_3 / (r0 + r1))


def _toward(x: Tensor, denoised: Tensor, share: float, h: float) -> Tensor:
    """share·x - expm1(-h)·denoised: the exact solution over h = -Δ ln σ if `denoised` stays constant."""
    return torch.add(x * share, denoised, alpha=-math.expm1(-h))


def _geometric_mean(sigma: Tensor, sigma_next: Tensor) -> float:
    """√(σ·σ_next) in float32, as published: Brownian noise is sensitive to the last digits of a level."""
    t, t_next = -sigma.log(), -sigma_next.log()
    return float((-(t + (t_next - t) / 2)).exp())
