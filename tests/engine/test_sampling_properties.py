"""Properties of a whole run on a tiny random network, and runs beside diffusers' schedulers."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modules.choices import RefinerSwapMethod, SamplerName, SchedulerName
from modules.engine.denoiser import Denoiser
from modules.engine.freeu import freeu
from modules.engine.guidance import Guidance
from modules.engine.noise import RowNoise
from modules.engine.refiner import Refiner
from modules.engine.sample import SamplingRun, sample
from modules.engine.samplers import SAMPLERS
from modules.engine.sigmas import model_sampling_for, schedule
from tests.engine.networks import tiny_conditioning, tiny_unet

SHAPE = (4, 8, 8)
UNET = tiny_unet()
REFINER_UNET = tiny_unet(seed=1)
GUIDANCE = Guidance(7.0, 5.0, 2.0)


@dataclass(frozen=True)
class Values:
    """What a run is made of."""

    sampler: str = "euler_ancestral"
    scheduler: str = "karras"
    steps: int = 4
    guidance: Guidance = GUIDANCE
    adm_end: float = 0.3
    late_size: float = 128.0
    seeds: tuple[int, ...] = (0,)
    refiner: RefinerSwapMethod | None = None
    freeu: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class FreeUFactors:
    b1: float
    b2: float
    s1: float
    s2: float


def finish(run: SamplingRun) -> Tensor:
    while True:
        try:
            next(run)
        except StopIteration as stop:
            return stop.value


def draw(values: Values) -> Tensor:
    """Latents of a run with fixed texts per seed."""
    model = model_sampling_for(values.scheduler)

    def texts(offset: int):
        rows = [tiny_conditioning(seed % 1000 + offset, late_size=values.late_size) for seed in values.seeds]
        return type(rows[0])(*(torch.cat(parts) for parts in zip(*(vars(row).values() for row in rows), strict=True)))

    def denoiser(unet) -> Denoiser:
        return Denoiser(unet, model, texts(0), texts(5000), values.guidance, adm_end=values.adm_end)

    refiner = Refiner(denoiser(REFINER_UNET), 2, values.refiner) if values.refiner else None
    with freeu(UNET, FreeUFactors(*values.freeu)) if values.freeu else nullcontext():
        return finish(
            sample(
                denoiser(UNET),
                RowNoise(values.seeds, SHAPE),
                sampler=values.sampler,
                scheduler=values.scheduler,
                steps=values.steps,
                model_sampling=model,
                refiner=refiner,
            )
        )


PLAIN = Values()


@pytest.mark.parametrize(
    "change",
    [
        {"guidance": Guidance(6.0, 5.0, 2.0)},
        {"guidance": Guidance(7.0, 6.0, 2.0)},
        {"guidance": Guidance(7.0, 5.0, 30.0)},
        {"adm_end": 0.6},
        {"late_size": 64.0},
        {"seeds": (1,)},
        {"refiner": RefinerSwapMethod.JOINT},
        {"refiner": RefinerSwapMethod.SEPARATE},
        {"refiner": RefinerSwapMethod.VAE},
        {"freeu": (1.3, 1.0, 1.0, 1.0)},
        {"freeu": (1.0, 1.3, 1.0, 1.0)},
        {"freeu": (1.0, 1.0, 0.5, 1.0)},
        {"freeu": (1.0, 1.0, 1.0, 0.5)},
    ],
    ids=str,
)
def test_every_parameter_changes_the_picture(change: dict) -> None:
    assert not torch.allclose(draw(replace(PLAIN, **change)), draw(PLAIN), atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        {"freeu": (1.0, 1.0, 1.0, 1.0)},
        {"guidance": Guidance(5.0, 30.0, 0.0)},
    ],
    ids=str,
)
def test_neutral_values_change_nothing(change: dict) -> None:
    base = replace(PLAIN, guidance=Guidance(5.0, 5.0, 0.0))
    assert draw(replace(base, **change)).equal(draw(base))


@pytest.mark.parametrize("change", [{"adaptive_scale": 3.0}, {"sharpness": 30.0}], ids=str)
def test_at_a_guidance_scale_of_one_nothing_else_acts(change: dict) -> None:
    base = replace(PLAIN, guidance=Guidance(1.0, 1.0, 0.0))
    assert draw(replace(base, guidance=replace(base.guidance, **change))).equal(draw(base))


@settings(max_examples=8, deadline=None)
@given(
    sampler=st.sampled_from([name for name in sorted(SamplerName) if SAMPLERS[name].rows_together]),
    scheduler=st.sampled_from(sorted(SchedulerName)),
    method=st.sampled_from([None, *RefinerSwapMethod]),
    seeds=st.lists(st.integers(0, 2**63 - 1), min_size=2, max_size=3),
)
def test_image_of_a_batch_equals_its_single_run(sampler: str, scheduler: str, method, seeds: list[int]) -> None:
    values = Values(sampler=sampler, scheduler=scheduler, refiner=method)
    batch = draw(replace(values, seeds=tuple(seeds)))
    for row, seed in enumerate(seeds):
        single = draw(replace(values, seeds=(seed,)))[0]
        error = float((single - batch[row]).square().mean().sqrt() / single.square().mean().sqrt())
        assert error < 3e-3, "50 dB below the picture"


@settings(max_examples=8, deadline=None)
@given(
    sampler=st.sampled_from(sorted(SamplerName)),
    scheduler=st.sampled_from(sorted(SchedulerName)),
    method=st.sampled_from([None, *RefinerSwapMethod]),
    seed=st.integers(0, 2**63 - 1),
)
def test_same_request_same_bits(sampler: str, scheduler: str, method, seed: int) -> None:
    values = Values(sampler=sampler, scheduler=scheduler, refiner=method, seeds=(seed,))
    first = draw(values)
    torch.randn(3)
    assert first.isfinite().all()
    assert draw(values).equal(first)


def toy(x: Tensor, sigma: float) -> Tensor:
    return torch.tanh(x / (1 + sigma**2) ** 0.5)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def beside(scheduler, steps: int) -> Tensor:
    """A run of a diffusers scheduler on the toy denoiser, from the same noise as ours."""
    scheduler.set_timesteps(steps)
    noise = RowNoise([0], SHAPE).normal()
    variance_preserving = isinstance(scheduler, DPMSolverMultistepScheduler)
    sigma = float(scheduler.sigmas[0])
    x = noise if variance_preserving else noise * (1 + sigma**2) ** 0.5
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(x, timestep)
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        sigma = float(scheduler.sigmas[scheduler.step_index])
        ours = x * (1 + sigma**2) ** 0.5 if variance_preserving else x
        x = scheduler.step((ours - toy(ours, sigma)) / sigma, timestep, x).prev_sample
    return x


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
@pytest.mark.parametrize("steps", [5, 12, 30])
@pytest.mark.parametrize(
    ("sampler", "scheduler", "settings"),
    [
        ("euler", EulerDiscreteScheduler, {"use_karras_sigmas": True}),
        ("euler", EulerDiscreteScheduler, {"use_exponential_sigmas": True}),
        ("heun", HeunDiscreteScheduler, {"use_karras_sigmas": True}),
        ("lms", LMSDiscreteScheduler, {"use_karras_sigmas": True}),
        (
            "dpmpp_2m",
            DPMSolverMultistepScheduler,
            {"use_karras_sigmas": True, "final_sigmas_type": "zero", "euler_at_final": False},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_beside_diffusers(sampler: str, scheduler, settings: dict, steps: int) -> None:
    name = "exponential" if "use_exponential_sigmas" in settings else "karras"
    theirs = scheduler(**BETAS, timestep_spacing="linspace", **settings)
    expected = beside(theirs, steps)
    assert theirs.sigmas.unique().tolist()[::-1] == pytest.approx(schedule(sampler, name, steps).tolist(), abs=1e-4)
    ours = finish(sample(toy, RowNoise([0], SHAPE), sampler=sampler, scheduler=name, steps=steps))
    assert float((ours - expected).abs().max()) < 2e-3
