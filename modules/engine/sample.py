"""A whole sampling run: from noise, over one model or two, to clean latents."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from modules.choices import RefinerSwapMethod
from modules.engine.noise import RowNoise
from modules.engine.refiner import Refiner, coloured_noise, renoised_sigmas
from modules.engine.sampler_contract import Denoise, SamplerStep
from modules.engine.samplers import SAMPLERS, Sampler
from modules.engine.sigmas import (
    ModelSampling,
    from_step,
    model_sampling_for,
    schedule,
    starts_from_pure_noise,
    until_step,
)


@dataclass(frozen=True, slots=True)
class SamplingStep:
    """A step in work, for progress and preview.

    Attributes:
        index: 0-based, over all stages of the run.
        total: steps expected; larger than every index.
        sigma: noise level of the step.
        denoised: (B, 4, h, w), the step's first estimate of the clean latents, in model space.
        refining: whether the estimate is the refiner's.
    """

    index: int
    total: int
    sigma: float
    denoised: Tensor
    refining: bool = False


Step = TypeVar("Step", SamplerStep, SamplingStep)
SamplingRun = Generator[SamplingStep, None, Tensor]
"""Yields after each step's first model evaluation and returns the clean latents (B, 4, h, w)."""


def start_state(noise: Tensor, sigmas: Tensor, model_sampling: ModelSampling, latents: Tensor | None) -> Tensor:
    """Noisy latents at the first level.

    A run from the model's largest level starts with the variance of data plus noise, any other with the
    level's own.

    Args:
        noise: (B, 4, h, w), N(0, 1).
        sigmas: (steps + 1,).
        latents: (B or 1, 4, h, w) in model space; None for zeros.
    """
    sigma = float(sigmas[0])
    scale = (1.0 + sigma**2) ** 0.5 if starts_from_pure_noise(sigmas, model_sampling) else sigma
    return noise * scale if latents is None else latents + noise * scale


def sample(
    denoise: Denoise,
    noise: RowNoise,
    *,
    sampler: str,
    scheduler: str,
    steps: int,
    strength: float = 1.0,
    model_sampling: ModelSampling | None = None,
    latents: Tensor | None = None,
    refiner: Refiner | None = None,
) -> SamplingRun:
    """Run a sampler over a schedule, and over a refiner if there is one.

    The caller owns progress, preview and cancelling: close the generator, or let `denoise` raise.

    Args:
        denoise: the base's model evaluation for B images.
        noise: random numbers of these images, nothing drawn yet.
        sampler, scheduler: public names.
        steps: steps wanted; some schedules run another number (see `schedule`).
        strength: share of the schedule that is run, above 0, at most 1.
        model_sampling: of the networks that run; None takes the one the scheduler implies.
        latents: (B or 1, 4, h, w) float32 in model space, what the noise is added to; None for zeros.
        refiner: the second model.
    Returns:
        (B, 4, h, w) float32 in the model space of the last model.
    Raises:
        ValueError: an unknown name, a value out of range, or a batch with a sampler whose rows influence
            each other (`Sampler.rows_together`).
    """
    chosen = _sampler(sampler, len(noise.seeds))
    model = model_sampling or model_sampling_for(scheduler)
    sigmas = schedule(sampler, scheduler, steps, strength, model)
    noise.span(float(sigmas[sigmas > 0].min()), float(sigmas.max()))
    x = start_state(noise.normal(), sigmas, model, latents)
    run = _Run(chosen, model, noise)
    if refiner is None:
        return (yield from run.stage(denoise, x, sigmas))
    if refiner.method == RefinerSwapMethod.JOINT:
        return (yield from run.joint(denoise, refiner, x, sigmas))
    if refiner.method == RefinerSwapMethod.SEPARATE:
        return (yield from run.separate(denoise, refiner, x, sigmas))
    return (yield from run.over_clean_latents(denoise, refiner, x, sigmas))


@dataclass
class _Run:
    """The stages of one run; counts steps over all of them."""

    sampler: Sampler
    model: ModelSampling
    noise: RowNoise
    done: int = 0

    def stage(
        self, denoise: Denoise, x: Tensor, sigmas: Tensor, *, later: int = 0, refining: bool = False
    ) -> SamplingRun:
        """One sampler run; `later` steps follow in other stages."""
        if len(sigmas) < 2:
            return x
        steps = len(sigmas) - 1
        expected = self.sampler.yields(steps) or steps
        total = self.done + expected + later
        run = self.sampler.run(denoise, x, sigmas, self.noise, self.model)
        before = self.done
        while True:
            step = _next(run)
            if isinstance(step, Tensor):
                self.done = before + expected
                return step
            index = before + step.index
            yield SamplingStep(index, max(total, index + 1), step.sigma, step.denoised, refining)

    def joint(self, base: Denoise, refiner: Refiner, x: Tensor, sigmas: Tensor) -> SamplingRun:
        """One sampler run; the model changes after the first evaluation of the switch step.

        That is one evaluation later than the name of the step says; existing pictures depend on it.
        """
        active = [base]
        run = self.stage(lambda x, sigma: active[0](x, sigma), x, sigmas)
        while True:
            step = _next(run)
            if isinstance(step, Tensor):
                return step
            yield replace(step, refining=active[0] is refiner.denoise)
            if step.index == refiner.switch_step:
                active[0] = refiner.denoise
                refiner.on_switch()

    def separate(self, base: Denoise, refiner: Refiner, x: Tensor, sigmas: Tensor) -> SamplingRun:
        """Two sampler runs; the second starts from the first one's noisy latents and continues its noise."""
        first, second = until_step(sigmas, refiner.switch_step), from_step(sigmas, refiner.switch_step)
        x = yield from self.stage(base, x, first, later=self._yields(second))
        if len(second) < 2:
            return x
        refiner.on_switch()
        return (yield from self.stage(refiner.denoise, x, second, refining=True))

    def over_clean_latents(self, base: Denoise, refiner: Refiner, x: Tensor, sigmas: Tensor) -> SamplingRun:
        """Two sampler runs, the first to clean latents, which are converted and noised again."""
        watched = _Watched(base)
        switch_step = max(1, refiner.switch_step)  # Without a first stage there is no noise estimate.
        first = until_step(sigmas, switch_step, force_full_denoise=True)
        second = renoised_sigmas(sigmas, switch_step)
        clean = yield from self.stage(watched, x, first, later=self._yields(second))
        converted = refiner.convert(clean)
        if len(second) < 2:
            return converted
        self.noise = self.noise.next_seeds()
        noise = coloured_noise(self.noise.normal(), watched.noise_pred())
        refiner.on_switch()
        x = start_state(noise, second, self.model, converted)
        return (yield from self.stage(refiner.denoise, x, second, refining=True))

    def _yields(self, sigmas: Tensor) -> int:
        steps = max(0, len(sigmas) - 1)
        return (self.sampler.yields(steps) or steps) if steps else 0


class _Watched:
    """A denoiser that remembers its last evaluation."""

    def __init__(self, denoise: Denoise) -> None:
        self._denoise = denoise
        self._last: tuple[Tensor, Tensor, float] | None = None

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        denoised = self._denoise(x, sigma)
        self._last = (x, denoised, sigma)
        return denoised

    def noise_pred(self) -> Tensor:
        """(x - denoised) / σ of the last evaluation, (B, 4, h, w)."""
        assert self._last is not None
        x, denoised, sigma = self._last
        return (x - denoised) / sigma


def _next(run: Generator[Step, None, Tensor]) -> Step | Tensor:
    """The next step of a run, or its result at its end."""
    try:
        return next(run)
    except StopIteration as end:
        result: Tensor = end.value
        return result


def _sampler(name: str, batch: int) -> Sampler:
    if name not in SAMPLERS:
        raise ValueError(f"Sampler '{name}' does not exist; use one of {', '.join(SAMPLERS)}.")
    if batch > 1 and not SAMPLERS[name].rows_together:
        raise ValueError(f"Sampler '{name}' takes one image at a time, not {batch}: its steps follow the image.")
    return SAMPLERS[name]
