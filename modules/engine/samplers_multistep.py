"""Linear multistep, UniPC and the DPM-Solver samplers that choose their own steps."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from modules.engine.sampler_contract import Denoise, Noise, SamplerRun, SamplerStep, slope

LMS_ORDER = 4
UNI_PC_ORDER = 3
UNI_PC_LAST_SIGMA = 0.001
ADAPTIVE_RELATIVE, ADAPTIVE_ABSOLUTE = 0.05, 0.0078
ADAPTIVE_FIRST_STEP = 0.05
ADAPTIVE_SAFETY = 0.81


def lms(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """Linear multistep (Adams-Bashforth) method of order up to 4 on the probability flow ODE."""
    levels = sigmas.tolist()
    slopes: deque[Tensor] = deque(maxlen=LMS_ORDER)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        denoised = denoise(x, sigma)
        yield SamplerStep(i, sigma, denoised, x)
        slopes.appendleft(slope(x, sigma, denoised))
        nodes = [levels[i - k] for k in range(len(slopes))]
        for weight, d in zip(_lagrange_integrals(nodes, sigma, sigma_next), slopes, strict=True):
            x = torch.add(x, d, alpha=weight)
    return x


def _lagrange_integrals(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Integral over [start, end] of each Lagrange basis polynomial of `nodes`."""
    # Two Gauss points integrate polynomials of degree 3 exactly; four nodes have no higher one.
    centre, half = (start + end) / 2, (end - start) / 2
    points = (centre - half / math.sqrt(3), centre + half / math.sqrt(3))

    def basis(k: int, sigma: float) -> float:
        return math.prod((sigma - n) / (nodes[k] - n) for j, n in enumerate(nodes) if j != k)

    return [half * sum(basis(k, point) for point in points) for k in range(len(nodes))]


def dpm_fast(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """DPM-Solver-fast (Lu et al. 2022, arXiv:2206.00927, section 3.4): as many evaluations as steps.

    Each of its about steps / 3 segments yields once; it ends at the smallest positive level, not at 0.
    """
    evaluations = len(sigmas) - 1
    start, end = _log_range(sigmas)
    if start == end:
        return (yield from _to_clean(denoise, x, math.exp(-start)))
    segments = evaluations // 3 + 1
    if evaluations % 3 == 0:
        orders = [3] * (segments - 2) + [2, 1]
    else:
        orders = [3] * (segments - 1) + [evaluations % 3]
    times = np.linspace(start, end, segments + 1).tolist()
    for i, (order, t, t_next) in enumerate(zip(orders, times, times[1:], strict=False)):
        sigma = math.exp(-t)
        denoised = denoise(x, sigma)
        yield SamplerStep(i, sigma, denoised, x)
        eps = slope(x, sigma, denoised)
        if order == 1:
            x = _dpm_1(x, eps, t, t_next)
        elif order == 2:
            x = _dpm_2(x, eps, _dpm_inner(denoise, x, eps, t, t_next, 1 / 2), t, t_next, 1 / 2)
        else:
            x = _dpm_3(denoise, x, eps, _dpm_inner(denoise, x, eps, t, t_next, 1 / 3), t, t_next)
    return x


def dpm_adaptive(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """DPM-Solver-23 with adaptive steps (Lu et al. 2022, arXiv:2206.00927, appendix C).

    Uses of the schedule its largest and smallest positive level only; yields once per trial step,
    accepted or not. Rows of a batch would share their steps, so it must run on one row at a time.
    """
    t, t_end = _log_range(sigmas)
    if t == t_end:
        return (yield from _to_clean(denoise, x, math.exp(-t)))
    size = ADAPTIVE_FIRST_STEP
    trial = 0
    low_previous = x
    while t < t_end - 1e-5:
        t_next = min(t_end, t + size)
        sigma = math.exp(-t)
        denoised = denoise(x, sigma)
        eps = slope(x, sigma, denoised)
        eps1 = _dpm_inner(denoise, x, eps, t, t_next, 1 / 3)
        low = _dpm_2(x, eps, eps1, t, t_next, 1 / 3)
        high = _dpm_3(denoise, x, eps, eps1, t, t_next)
        yield SamplerStep(trial, sigma, denoised, x)
        tolerance = (ADAPTIVE_RELATIVE * torch.maximum(low.abs(), low_previous.abs())).clamp_(min=ADAPTIVE_ABSOLUTE)
        error = float(((low - high) / tolerance).square().mean().sqrt())
        factor = 1 + math.atan((error + 1e-8) ** (-1 / 3) - 1)
        if factor >= ADAPTIVE_SAFETY:
            low_previous, x, t = low, high, t_next
        size *= factor
        trial += 1
    return x


def _to_clean(denoise: Denoise, x: Tensor, sigma: float) -> SamplerRun:
    """A schedule with one positive level spans no time; what is left of it is one step to 0."""
    denoised = denoise(x, sigma)
    yield SamplerStep(0, sigma, denoised, x)
    return denoised


def _log_range(sigmas: Tensor) -> tuple[float, float]:
    """-ln σ of the first and of the last positive level."""
    positive = sigmas[sigmas > 0]
    return -math.log(float(positive[0])), -math.log(float(positive[-1]))


def _dpm_1(x: Tensor, eps: Tensor, t: float, t_next: float) -> Tensor:
    return torch.sub(x, eps, alpha=math.exp(-t_next) * math.expm1(t_next - t))


def _dpm_inner(denoise: Denoise, x: Tensor, eps: Tensor, t: float, t_next: float, r: float) -> Tensor:
    """The noise estimate after a first-order step over the share r of [t, t_next]."""
    s = t + r * (t_next - t)
    u = _dpm_1(x, eps, t, s)
    return slope(u, math.exp(-s), denoise(u, math.exp(-s)))


def _dpm_2(x: Tensor, eps: Tensor, eps1: Tensor, t: float, t_next: float, r: float) -> Tensor:
    gain = math.exp(-t_next) * math.expm1(t_next - t)
    return torch.sub(_dpm_1(x, eps, t, t_next), eps1 - eps, alpha=gain / (2 * r))


def _dpm_3(denoise: Denoise, x: Tensor, eps: Tensor, eps1: Tensor, t: float, t_next: float) -> Tensor:
    """Third-order step with r1 = 1/3, r2 = 2/3."""
    r1, r2 = 1 / 3, 2 / 3
    h = t_next - t
    s2 = t + r2 * h
    bend = r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1)
    u2 = torch.sub(_dpm_1(x, eps, t, s2), eps1 - eps, alpha=math.exp(-s2) * bend)
    eps2 = slope(u2, math.exp(-s2), denoise(u2, math.exp(-s2)))
    gain = math.exp(-t_next) / r2 * (math.expm1(h) / h - 1)
    return torch.sub(_dpm_1(x, eps, t, t_next), eps2 - eps, alpha=gain)


def uni_pc(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """UniPC of order up to 3 with B(h) = h (Zhao et al. 2023, arXiv:2302.04867)."""
    return (yield from _uni_pc(denoise, x, sigmas, exponential=False))


def uni_pc_bh2(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> SamplerRun:
    """UniPC of order up to 3 with B(h) = e^h - 1."""
    return (yield from _uni_pc(denoise, x, sigmas, exponential=True))


def _uni_pc(denoise: Denoise, x: Tensor, sigmas: Tensor, *, exponential: bool) -> SamplerRun:
    """Multistep predictor-corrector on data predictions, in variance-preserving variables."""
    levels = sigmas.tolist()
    levels[-1] = levels[-1] or UNI_PC_LAST_SIGMA
    steps = len(levels) - 1
    order = min(UNI_PC_ORDER, len(levels) - 2)
    denoised = denoise(x, levels[0])
    yield SamplerStep(0, levels[0], denoised, x)
    history = deque([denoised], maxlen=UNI_PC_ORDER)
    v = x * _alpha(levels[0])
    for i in range(1, steps + 1):
        used = max(1, min(i, order, steps + 1 - i))
        step = _UniPcStep(levels[: i + 1], history, v, used, exponential)
        v = step.predicted()
        if i < steps:
            x = v / _alpha(levels[i])
            denoised = denoise(x, levels[i])
            yield SamplerStep(i, levels[i], denoised, x)
            v = step.corrected(denoised)
            history.appendleft(denoised)
    return v / _alpha(levels[-1])


class _UniPcStep:
    """One step of UniPC, from the second-to-last of `levels` to the last.

    Args:
        levels: σ visited so far, and the one to reach.
        history: denoised latents, newest first.
        v: variance-preserving latents at the second-to-last level.
        order: 1 to 3.
        exponential: whether B(h) = e^h - 1, else h.
    """

    def __init__(
        self, levels: Sequence[float], history: Sequence[Tensor], v: Tensor, order: int, exponential: bool
    ) -> None:
        # λ = ln(α / s) with s = σ·α, so λ = -ln σ.
        lambdas = [-math.log(sigma) for sigma in levels]
        h = lambdas[-1] - lambdas[-2]
        self._newest = history[0]
        self._ratios = [(lambdas[-2 - j] - lambdas[-2]) / h for j in range(1, order)]
        self._differences = [(history[j] - self._newest) / ratio for j, ratio in enumerate(self._ratios, start=1)]
        self._ratios.append(1.0)
        self._order = order
        alpha = _alpha(levels[-1])
        scale = (levels[-1] * alpha) / (levels[-2] * _alpha(levels[-2]))
        self._base = torch.sub(v * scale, self._newest, alpha=alpha * math.expm1(-h))
        b_h = math.expm1(-h) if exponential else -h
        self._gain = alpha * b_h
        self._moments = _uni_pc_moments(-h, b_h, order)

    def predicted(self) -> Tensor:
        """Latents at the next level from past model outputs alone."""
        if self._order == 1:
            return self._base
        weights = [0.5] if self._order == 2 else self._weights(self._order - 1)
        return self._with(weights, self._differences)

    def corrected(self, denoised: Tensor) -> Tensor:
        """Latents at the next level with the model's output there, which no further evaluation costs."""
        weights = [0.5] if self._order == 1 else self._weights(self._order)
        return self._with(weights, [*self._differences, denoised - self._newest])

    def _weights(self, count: int) -> list[float]:
        ratios = np.asarray(self._ratios[:count])
        matrix = np.stack([ratios**k for k in range(count)])
        weights: list[float] = np.linalg.solve(matrix, np.asarray(self._moments[:count])).tolist()
        return weights

    def _with(self, weights: Sequence[float], differences: Sequence[Tensor]) -> Tensor:
        v = self._base
        for weight, difference in zip(weights, differences, strict=True):
            v = torch.sub(v, difference, alpha=self._gain * weight)
        return v


def _uni_pc_moments(big_h: float, b_h: float, order: int) -> list[float]:
    """Right-hand side b_1 … b_order of UniPC's linear system, for H = -h."""
    moments = []
    q, factorial = math.expm1(big_h) / big_h - 1, 1
    for k in range(1, order + 1):
        moments.append(q * factorial / b_h)
        factorial *= k + 1
        q = q / big_h - 1 / factorial
    return moments


def _alpha(sigma: float) -> float:
    """Signal scale of the variance-preserving form: x_vp = α·x."""
    return 1 / math.sqrt(1 + sigma * sigma)
