"""Samplers give the published numbers, converge on the exact answer and keep rows apart."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modules.choices import SamplerName
from modules.engine.noise import RowNoise
from modules.engine.samplers import SAMPLERS, SamplerRun, SamplerStep
from modules.engine.sigmas import model_sampling_for, schedule
from tests.engine import golden

Denoise = Callable[[Tensor, float], Tensor]
SHAPE = (4, 16, 16)
DETERMINISTIC = ["euler", "ddim", "heun", "heunpp2", "dpm_2", "lms", "dpmpp_2m", "uni_pc", "uni_pc_bh2"]


class Toy:
    """D = tanh(x / √(1 + σ²)), counting its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        self.calls += 1
        return torch.tanh(x / (1 + sigma**2) ** 0.5)


def start(
    name: str, scheduler: str, steps: int, denoise: Denoise, seeds: tuple[int, ...] = (0,)
) -> tuple[SamplerRun, Tensor]:
    """A run from pure noise, and its start."""
    model = model_sampling_for(scheduler)
    sigmas = schedule(name, scheduler, steps, 1.0, model)
    noise = RowNoise(seeds, SHAPE)
    x = noise.normal() * (1 + sigmas[0] ** 2) ** 0.5
    noise.span(float(sigmas[-2]), float(sigmas[0]))
    return SAMPLERS[name].run(denoise, x, sigmas, noise, model), x


def finish(run: SamplerRun) -> tuple[Tensor, list[SamplerStep]]:
    """Final latents and all steps."""
    steps = []
    while True:
        try:
            steps.append(next(run))
        except StopIteration as stop:
            return stop.value, steps


@pytest.mark.parametrize("row", golden.SAMPLERS, ids=lambda row: f"{row.sampler}-{row.scheduler}-{row.steps}")
def test_sampler_gives_published_numbers(row: golden.SamplerRow) -> None:
    toy = Toy()
    x, steps = finish(start(row.sampler, row.scheduler, row.steps, toy)[0])
    assert (toy.calls, len(steps)) == (row.calls, row.yields)
    flat = x.flatten()
    found = [*(float(flat[i]) for i in (0, 1, -1)), float(x.mean()), float(x.std())]
    assert found == pytest.approx([row.first, row.second, row.last, row.mean, row.std], abs=1e-4)


def test_every_sampler_of_the_vocabulary_exists() -> None:
    assert set(SAMPLERS) == set(SamplerName)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name.endswith("_gpu")])
def test_gpu_names_are_aliases(name: str) -> None:
    assert SAMPLERS[name].function is SAMPLERS[name.removesuffix("_gpu")].function


@pytest.mark.parametrize("name", SAMPLERS)
def test_facts_of_the_registry_hold(name: str) -> None:
    sampler = SAMPLERS[name]
    for steps in (1, 6, 7):
        toy = Toy()
        x, seen = finish(start(name, "karras", steps, toy)[0])
        assert x.isfinite().all()
        assert [step.index for step in seen] == list(range(len(seen)))
        if sampler.yields(steps) is not None:
            assert len(seen) == sampler.yields(steps)
            assert toy.calls <= sampler.calls_per_step * steps


@pytest.mark.parametrize("name", SAMPLERS)
def test_first_yield_follows_the_first_evaluation(name: str) -> None:
    toy = Toy()
    run, x = start(name, "karras", 8, toy)
    assert toy.calls == 0
    step = next(run)
    assert toy.calls == (3 if name == "dpm_adaptive" else 1)
    assert step.x.equal(x)
    if name != "tcd":
        assert step.denoised.equal(torch.tanh(x / (1 + step.sigma**2) ** 0.5))


@pytest.mark.parametrize("name", SAMPLERS)
def test_input_is_never_changed_in_place(name: str) -> None:
    run, x = start(name, "karras", 6, Toy())
    before = x.clone()
    _, steps = finish(run)
    assert x.equal(before)
    assert all(step.x.isfinite().all() for step in steps)


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.rows_together])
def test_rows_of_a_batch_equal_their_single_runs(name: str) -> None:
    seeds = (3, 9, 2**40)
    batch, _ = finish(start(name, "karras", 8, Toy(), seeds)[0])
    for row, seed in enumerate(seeds):
        single, _ = finish(start(name, "karras", 8, Toy(), (seed,))[0])
        assert torch.allclose(single[0], batch[row], atol=1e-5)


@pytest.mark.parametrize("name", SAMPLERS)
def test_same_seed_gives_the_same_bits(name: str) -> None:
    first, _ = finish(start(name, "karras", 20, Toy())[0])
    second, _ = finish(start(name, "karras", 20, Toy())[0])
    assert first.equal(second)


def ideal_gaussian(x: Tensor, sigma: float) -> Tensor:
    """The perfect denoiser of data that is N(0, 1/4)."""
    return x * 0.25 / (0.25 + sigma**2)


def relative_error(name: str, steps: int) -> float:
    """Distance from the exact solution x(σ) = x(σ0)·√((1/4 + σ²) / (1/4 + σ0²)) of the ideal denoiser's ODE."""
    run, x = start(name, "exponential", steps, lambda x, sigma: ideal_gaussian(x.double(), sigma))
    sigma, sigma_end = (float(schedule(name, "exponential", steps)[i]) for i in (0, -2))
    _, seen = finish(run)
    last = next(step for step in seen if step.sigma <= sigma_end * 1.0001)
    exact = x.double() * ((0.25 + last.sigma**2) / (0.25 + sigma**2)) ** 0.5
    return float((last.x - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpm_2", 2), ("dpmpp_2m", 2), ("lms", 3)]
)
def test_error_falls_with_the_order_of_the_method(name: str, order: int) -> None:
    coarse, fine = relative_error(name, 40), relative_error(name, 80)
    assert coarse / fine > 2 ** (order - 0.25)


@pytest.mark.parametrize("name", [*DETERMINISTIC, "dpm_fast", "dpm_adaptive"])
def test_deterministic_samplers_agree_on_the_exact_answer(name: str) -> None:
    run, x = start(name, "karras", 100, ideal_gaussian)
    final, _ = finish(run)
    sigma = float(schedule(name, "karras", 100)[0])
    exact = x * (0.25 / (0.25 + sigma**2)) ** 0.5
    assert float((final - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("lcm", "tcd")])
def test_samplers_give_the_distribution_of_the_data(name: str) -> None:
    final, _ = finish(start(name, "karras", 60, ideal_gaussian, tuple(range(4)))[0])
    assert float(final.mean()) == pytest.approx(0.0, abs=0.03)
    assert float(final.std()) == pytest.approx(0.5, rel=0.08)


def test_a_run_ends_where_it_is_closed() -> None:
    toy = Toy()
    run, _ = start("heun", "karras", 8, toy)
    next(run), next(run)
    run.close()
    assert toy.calls == 3
