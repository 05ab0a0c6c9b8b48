"""Noise levels: how a network relates to them, and which of them a run visits."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "edm", "lcm"]

TRAINING_STEPS = 1000
BEYOND_EVERY_SIGMA = 999999999.9
DISTILLED_STRIDE = 20

DISCARDS_PENULTIMATE = frozenset({"dpm_2", "dpm_2_ancestral", "uni_pc", "uni_pc_bh2"})
"""Samplers that run on one step more with its second-to-last level left out."""

SCHEDULE_USED = {"lcm": "sgm_uniform", "tcd": "sgm_uniform", "edm_playground_v2.5": "karras"}
"""Scheduler names that change the model sampling, and the schedule each runs on."""

ALIGN_YOUR_STEPS_SDXL = (
    14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141,
    0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582,
)  # fmt: skip
"""Sabour et al. 2024 (arXiv:2404.14507), the SDXL table for 10 steps."""


@cache
def training_alphas_cumprod() -> Tensor:
    """Cumulative signal share of Stable Diffusion's training schedule: (1000,) float64, descending.

    Betas are evenly spaced in their square roots from 0.00085 to 0.012.
    """
    betas = np.linspace(0.00085**0.5, 0.012**0.5, TRAINING_STEPS, dtype=np.float64) ** 2
    return torch.from_numpy(np.cumprod(1.0 - betas))


@cache
def training_sigmas() -> Tensor:
    """Noise levels of the 1000 training timesteps: (1000,) float32, ascending, 0.0292 to 14.6146."""
    alphas_cumprod = training_alphas_cumprod()
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt().float()


@dataclass(frozen=True, eq=False)
class ModelSampling(ABC):
    """What a network's input and output mean at a noise level.

    Attributes:
        sigmas: (n,) float32, ascending; the levels the network knows.
        prediction: what the network's output is.
        sigma_data: standard deviation of the clean latents the network was trained for.
    """

    sigmas: Tensor = field(repr=False)
    prediction: Prediction = "epsilon"
    sigma_data: float = 1.0

    @property
    def sigma_min(self) -> float:
        """Smallest level of the table, in latent standard deviations."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """Largest level of the table, in latent standard deviations."""
        return float(self.sigmas[-1])

    @abstractmethod
    def sigma_to_timestep(self, sigma: float | Tensor) -> Tensor:
        """Timesteps the network is told at these levels; same shape as `sigma`."""

    @abstractmethod
    def timestep_to_sigma(self, timestep: float | Tensor) -> Tensor:
        """Levels at these, possibly fractional, timesteps: float32, same shape as `timestep`."""

    @abstractmethod
    def percent_to_sigma(self, percent: float) -> float:
        """Level at which `percent` (0 to 1) of the denoising is done; the largest come first.

        At or below 0 it lies above every level, at or above 1 it is 0.
        """

    @abstractmethod
    def sigma_to_percent(self, sigma: float) -> float:
        """Share of the denoising that is done at this level, 0 to 1: what limits of features compare with."""

    def scaled_input(self, x: Tensor, sigma: float) -> Tensor:
        """`x` (B, 4, h, w) brought to the variance the network expects at `sigma`."""
        return x / math.sqrt(sigma * sigma + self.sigma_data**2)

    def denoised_from(self, output: Tensor, x: Tensor, sigma: float) -> Tensor:
        """The clean latents that the network's `output` for the noisy `x` implies.

        Args:
            output: (B, 4, h, w), what the network returned.
            x: (B, 4, h, w), noisy latents before input scaling.
            sigma: noise level of `x`, in latent standard deviations.
        """
        if self.prediction == "epsilon":
            return torch.sub(x, output, alpha=sigma)
        if self.prediction == "lcm":
            return self._consistency_output(output, x, sigma)
        variance = sigma * sigma + self.sigma_data**2
        skip = self.sigma_data**2 / variance
        gain = sigma * self.sigma_data / math.sqrt(variance)
        return torch.add(x * skip, output, alpha=gain if self.prediction == "edm" else -gain)

    def _consistency_output(self, output: Tensor, x: Tensor, sigma: float) -> Tensor:
        """Boundary rule of latent consistency models (Luo et al. 2023, arXiv:2310.04378, appendix D)."""
        scaled_timestep = 10.0 * float(self.sigma_to_timestep(sigma))
        variance = scaled_timestep**2 + 0.25
        clean = torch.sub(x, output, alpha=sigma)
        return torch.add(clean * (scaled_timestep / math.sqrt(variance)), x, alpha=0.25 / variance)


@dataclass(frozen=True, eq=False)
class DiscreteSampling(ModelSampling):
    """A network trained on numbered timesteps: table entry k belongs to timestep offset + k·stride."""

    stride: int = 1
    offset: int = 0
    log_sigmas: Tensor = field(init=False, repr=False)
    exact_log_sigmas: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_sigmas", self.sigmas.log())
        object.__setattr__(self, "exact_log_sigmas", self.sigmas.double().log())

    def sigma_to_timestep(self, sigma: float | Tensor) -> Tensor:
        """The timestep whose level is nearest in ln σ; never interpolated, int64."""
        # float64: in float32 the half-way levels of sgm_uniform are ties that the CPU's vector width decides.
        log_sigma = torch.as_tensor(sigma, dtype=torch.float64, device=self.sigmas.device).log()
        distance = log_sigma - self.exact_log_sigmas.view(-1, *[1] * log_sigma.ndim)
        return distance.abs().argmin(dim=0) * self.stride + self.offset

    def timestep_to_sigma(self, timestep: float | Tensor) -> Tensor:
        """Level interpolated in ln σ; timesteps outside the table count as its ends."""
        t = torch.as_tensor(timestep, dtype=torch.float32, device=self.sigmas.device)
        index = ((t - self.offset) / self.stride).clamp(0, len(self.sigmas) - 1)
        low, high = index.floor().long(), index.ceil().long()
        weight = index.frac()
        return ((1 - weight) * self.log_sigmas[low] + weight * self.log_sigmas[high]).exp()

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0.0:
            return BEYOND_EVERY_SIGMA
        if percent >= 1.0:
            return 0.0
        return float(self.timestep_to_sigma((1.0 - percent) * 999.0))

    def sigma_to_percent(self, sigma: float) -> float:
        return 1.0 - float(self.sigma_to_timestep(sigma)) / 999.0


@dataclass(frozen=True, eq=False)
class EdmSampling(ModelSampling):
    """A network trained on continuous levels, told t = ¼·ln σ (Karras et al. 2022, table 1)."""

    def sigma_to_timestep(self, sigma: float | Tensor) -> Tensor:
        return 0.25 * torch.as_tensor(sigma, dtype=torch.float32, device=self.sigmas.device).log()

    def timestep_to_sigma(self, timestep: float | Tensor) -> Tensor:
        return (4.0 * torch.as_tensor(timestep, dtype=torch.float32, device=self.sigmas.device)).exp()

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0.0:
            return BEYOND_EVERY_SIGMA
        if percent >= 1.0:
            return 0.0
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return math.exp((high - low) * (1.0 - percent) + low)

    def sigma_to_percent(self, sigma: float) -> float:
        # Its timesteps lie within -1.6 … 1.2, so 1 - t / 999 would put every step at the end of the run.
        low, high = math.log(self.sigma_min), math.log(self.sigma_max)
        return min(1.0, max(0.0, (high - math.log(sigma)) / (high - low)))


@cache
def model_sampling_for(scheduler: str, prediction_type: Prediction = "epsilon") -> ModelSampling:
    """The model sampling that a scheduler name implies.

    Args:
        scheduler: public name; `lcm`, `tcd` and `edm_playground_v2.5` replace the checkpoint's own rule.
        prediction_type: what the checkpoint's network predicts under every other scheduler.
    """
    if scheduler == "edm_playground_v2.5":
        levels = torch.linspace(math.log(0.002), math.log(120.0), TRAINING_STEPS).exp()
        return EdmSampling(levels, prediction="edm", sigma_data=0.5)
    if scheduler in ("lcm", "tcd"):
        first = DISTILLED_STRIDE - 1
        return DiscreteSampling(
            training_sigmas()[first::DISTILLED_STRIDE],
            prediction="lcm" if scheduler == "lcm" else "epsilon",
            stride=DISTILLED_STRIDE,
            offset=first,
        )
    return DiscreteSampling(training_sigmas(), prediction=prediction_type)


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Noise levels evenly spaced in σ^(1/rho), largest first, then 0.

    Karras et al. 2022 (arXiv:2206.00364), eq. 5.

    Args:
        steps: levels wanted before the 0.
        sigma_min, sigma_max: ends of the range, in latent standard deviations.
    Returns:
        (steps + 1,) float32, descending.
    """
    ramp = torch.linspace(0, 1, steps)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _then_zero((high + ramp * (low - high)) ** rho)


def exponential_sigmas(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Noise levels evenly spaced in ln σ, largest first, then 0: (steps + 1,) float32."""
    return _then_zero(torch.linspace(math.log(sigma_max), math.log(sigma_min), steps).exp())


def align_your_steps_sigmas(steps: int) -> Tensor:
    """The published 10-step SDXL levels, interpolated in ln σ to `steps`: (steps + 1,) float32, last 0."""
    table = np.log(np.asarray(ALIGN_YOUR_STEPS_SDXL))
    positions = np.linspace(0.0, 1.0, steps + 1)
    levels = np.exp(np.interp(positions, np.linspace(0.0, 1.0, len(table)), table))
    levels[-1] = 0.0
    return torch.from_numpy(levels).float()


def _karras(steps: int, model: ModelSampling) -> Tensor:
    return karras_sigmas(steps, model.sigma_min, model.sigma_max)


def _exponential(steps: int, model: ModelSampling) -> Tensor:
    return exponential_sigmas(steps, model.sigma_min, model.sigma_max)


def _normal(steps: int, model: ModelSampling) -> Tensor:
    return _then_zero(model.timestep_to_sigma(torch.linspace(*_timestep_range(model), steps)))


def _sgm_uniform(steps: int, model: ModelSampling) -> Tensor:
    return _then_zero(model.timestep_to_sigma(torch.linspace(*_timestep_range(model), steps + 1)[:-1]))


def _simple(steps: int, model: ModelSampling) -> Tensor:
    last = len(model.sigmas) - 1
    stride = len(model.sigmas) / steps
    return _then_zero(model.sigmas[[last - int(i * stride) for i in range(steps)]])


def _ddim_uniform(steps: int, model: ModelSampling) -> Tensor:
    stride = max(1, len(model.sigmas) // steps)
    return _then_zero(model.sigmas[1::stride].flip(0))


def _turbo(steps: int, model: ModelSampling) -> Tensor:
    return _then_zero(model.timestep_to_sigma(torch.arange(999, 0, -100)[:steps]))


def _align_your_steps(steps: int, _model: ModelSampling) -> Tensor:
    return align_your_steps_sigmas(steps)


def _timestep_range(model: ModelSampling) -> tuple[float, float]:
    return float(model.sigma_to_timestep(model.sigma_max)), float(model.sigma_to_timestep(model.sigma_min))


def _then_zero(levels: Tensor) -> Tensor:
    return torch.cat([levels.float(), levels.new_zeros(1, dtype=torch.float32)])


SCHEDULES: Mapping[str, Callable[[int, ModelSampling], Tensor]] = {
    "karras": _karras,
    "exponential": _exponential,
    "normal": _normal,
    "sgm_uniform": _sgm_uniform,
    "simple": _simple,
    "ddim_uniform": _ddim_uniform,
    "turbo": _turbo,
    "align_your_steps": _align_your_steps,
}
"""Schedules by public name; `lcm`, `tcd` and `edm_playground_v2.5` run on one of them (SCHEDULE_USED)."""


def schedule(
    sampler: str,
    scheduler: str,
    steps: int,
    strength: float = 1.0,
    model_sampling: ModelSampling | None = None,
) -> Tensor:
    """The noise levels that a run visits, largest first, last 0.

    With a strength below 1 the levels of ⌊steps / strength⌋ steps are built and the last `steps` steps
    kept, so the requested number of steps is really run. `ddim_uniform` and `turbo` may give another
    number of steps than asked for (30 becomes 31; at most 10); the length of the result tells.

    Args:
        sampler: public name; some leave out the second-to-last level (DISCARDS_PENULTIMATE).
        scheduler: public name.
        steps: steps wanted, ≥ 1.
        strength: share of the schedule that is run, above 0, at most 1.
        model_sampling: of the network that runs; None takes the one the scheduler implies.
    Returns:
        (steps + 1,) float32, descending.
    Raises:
        ValueError: the scheduler is unknown, or steps or strength are out of range.
    """
    used = SCHEDULE_USED.get(scheduler, scheduler)
    if used not in SCHEDULES:
        names = ", ".join([*SCHEDULES, *SCHEDULE_USED])
        raise ValueError(f"Scheduler '{scheduler}' does not exist; use one of {names}.")
    if steps < 1:
        raise ValueError(f"A run needs at least 1 step, not {steps}.")
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"Strength must be above 0 and at most 1, not {strength}.")
    model = model_sampling or model_sampling_for(scheduler)
    built = steps if strength > 0.9999 else int(steps / strength)
    extra = 1 if sampler in DISCARDS_PENULTIMATE else 0
    levels = SCHEDULES[used](built + extra, model)
    if extra:
        levels = torch.cat([levels[:-2], levels[-1:]])
    return levels if strength > 0.9999 else levels[-(steps + 1) :]


def starts_from_pure_noise(sigmas: Tensor, model_sampling: ModelSampling) -> bool:
    """Whether the first level is the model's largest, to 1 part in 100 000."""
    first, largest = float(sigmas[0]), model_sampling.sigma_max
    return first > largest or math.isclose(first, largest, rel_tol=1e-5)


def until_step(sigmas: Tensor, step: int, *, force_full_denoise: bool = False) -> Tensor:
    """Levels of the steps before `step`; the last becomes 0 if the run must end without noise.

    Args:
        sigmas: (steps + 1,), descending.
        step: number of steps kept; beyond the end it changes nothing.
    Returns:
        (min(step, steps) + 1,), a copy.
    """
    kept = sigmas[: step + 1].clone()
    if force_full_denoise:
        kept[-1] = 0.0
    return kept


def from_step(sigmas: Tensor, step: int) -> Tensor:
    """Levels from `step` (0-based) on: (steps + 1 - step,)."""
    return sigmas[step:]
