"""A run composes noise, schedule, sampler and models, and changes models where it is told."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modules.choices import RefinerSwapMethod, SamplerName, SchedulerName
from modules.engine.noise import RowNoise
from modules.engine.refiner import Refiner
from modules.engine.sample import SamplingRun, SamplingStep, sample, start_state
from modules.engine.samplers import SAMPLERS
from modules.engine.sigmas import model_sampling_for, schedule

SHAPE = (4, 8, 8)
JOINT, SEPARATE, VAE = RefinerSwapMethod
ONE_CALL = "euler"


class Model:
    """A denoiser whose clean latents are `value`, keeping what it is asked."""

    def __init__(self, value: float = 0.5) -> None:
        self.value = value
        self.sigmas: list[float] = []
        self.inputs: list[Tensor] = []
        self.noise: Tensor | None = None

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        self.sigmas.append(sigma)
        self.inputs.append(x)
        denoised = torch.tanh(x) * 0 + self.value
        self.noise = (x - denoised) / sigma
        return denoised

    def noise_pred(self) -> Tensor:
        assert self.noise is not None
        return self.noise


def tanh(x: Tensor, sigma: float) -> Tensor:
    return torch.tanh(x / (1 + sigma**2) ** 0.5)


def finish(run: SamplingRun) -> tuple[Tensor, list[SamplingStep]]:
    steps = []
    while True:
        try:
            steps.append(next(run))
        except StopIteration as stop:
            return stop.value, steps


def run(denoise: Callable = tanh, seeds: tuple[int, ...] = (0,), **values) -> tuple[Tensor, list[SamplingStep]]:
    chosen = {"sampler": ONE_CALL, "scheduler": "karras", "steps": 10, **values}
    return finish(sample(denoise, RowNoise(seeds, SHAPE), **chosen))


@pytest.mark.parametrize("sampler", SamplerName)
def test_a_run_equals_its_sampler_on_its_schedule(sampler: SamplerName) -> None:
    final, steps = run(sampler=sampler)
    model = model_sampling_for("karras")
    sigmas = schedule(sampler, "karras", 10, 1.0, model)
    noise = RowNoise([0], SHAPE)
    noise.span(float(sigmas[-2]), float(sigmas[0]))
    x = noise.normal() * (1 + float(sigmas[0]) ** 2) ** 0.5
    by_hand = SAMPLERS[sampler].run(tanh, x, sigmas, noise, model)
    expected, seen = finish(by_hand)
    assert final.equal(expected)
    assert [step.index for step in steps] == list(range(len(seen)))
    assert all(a.denoised.equal(b.denoised) for a, b in zip(steps, seen, strict=True))


@pytest.mark.parametrize("sampler", SamplerName)
@pytest.mark.parametrize("method", [None, *RefinerSwapMethod])
def test_progress_grows_to_its_total(sampler: SamplerName, method: RefinerSwapMethod | None) -> None:
    base = Model()
    refiner = Refiner(Model(0.25), 6, method) if method else None
    _, steps = run(base, sampler=sampler, refiner=refiner)
    assert [step.index for step in steps] == sorted({step.index for step in steps})
    assert all(step.index < step.total for step in steps)
    if sampler not in ("dpm_adaptive", "dpm_fast"):
        assert [(step.index, step.total) for step in steps] == [(i, 10) for i in range(10)]


def test_ddim_uniform_reports_the_steps_it_really_runs() -> None:
    _, steps = run(scheduler="ddim_uniform", steps=30)
    assert {step.total for step in steps} == {31}
    assert len(steps) == 31


def test_start_state_follows_the_first_level() -> None:
    model, noise, latents = model_sampling_for("karras"), torch.randn(2, *SHAPE), torch.ones(1, *SHAPE)
    full, part = torch.tensor([model.sigma_max, 0.0]), torch.tensor([2.0, 0.0])
    assert start_state(noise, full, model, None).equal(noise * (1 + float(full[0]) ** 2) ** 0.5)
    assert start_state(noise, part, model, latents).equal(latents + noise * 2.0)


def test_strength_starts_from_the_latents() -> None:
    model, latents = Model(), torch.full((1, *SHAPE), 3.0)
    _, steps = run(model, steps=18, strength=0.382, latents=latents)
    assert len(steps) == 18
    assert model.sigmas[0] == pytest.approx(0.5690, abs=1e-4)
    assert model.inputs[0].equal(latents + RowNoise([0], SHAPE).normal() * model.sigmas[0])


@pytest.mark.parametrize("sampler", [name for name, sampler in SAMPLERS.items() if sampler.rows_together])
@pytest.mark.parametrize("method", [None, *RefinerSwapMethod])
def test_rows_equal_their_single_runs(sampler: str, method: RefinerSwapMethod | None) -> None:
    seeds = (5, 6, 2**63 - 1)

    def second(x: Tensor, sigma: float) -> Tensor:
        return tanh(x, sigma) * 0.5

    refiner = Refiner(second, 4, method) if method else None

    def final(some: tuple[int, ...]) -> Tensor:
        return run(tanh, some, sampler=sampler, refiner=refiner)[0]

    batch = final(seeds)
    for row, seed in enumerate(seeds):
        assert torch.allclose(final((seed,))[0], batch[row], atol=1e-4)


def test_a_sampler_that_mixes_rows_refuses_a_batch() -> None:
    with pytest.raises(ValueError, match="one image at a time"):
        run(seeds=(0, 1), sampler="dpm_adaptive")


def test_unknown_names_are_named() -> None:
    with pytest.raises(ValueError, match="'eulr' does not exist"):
        run(sampler="eulr")
    with pytest.raises(ValueError, match="'carras' does not exist"):
        run(scheduler="carras")


@pytest.mark.parametrize(("sampler", "base_calls", "refiner_calls"), [("euler", 5, 5), ("heun", 9, 10)])
def test_joint_changes_after_the_first_evaluation_of_the_step(
    sampler: str, base_calls: int, refiner_calls: int
) -> None:
    """Steps 0 … 4 begin with the base; from the second evaluation of step 4 on, the refiner answers."""
    base, second, switches = Model(), Model(), []
    refiner = Refiner(second, 4, JOINT, on_switch=lambda: switches.append(len(base.sigmas)))
    _, steps = run(base, sampler=sampler, refiner=refiner)
    assert (len(base.sigmas), len(second.sigmas)) == (base_calls, refiner_calls)
    assert [step.refining for step in steps] == [False] * 5 + [True] * 5
    assert switches == [base_calls]


@pytest.mark.parametrize("method", RefinerSwapMethod)
def test_a_switch_at_the_end_never_comes(method: RefinerSwapMethod) -> None:
    base, second = Model(), Model()
    refiner = Refiner(second, 10, method, on_switch=pytest.fail)
    final, steps = run(base, refiner=refiner)
    assert final.equal(run(Model())[0])
    assert (len(base.sigmas), len(second.sigmas), len(steps)) == (10, 0, 10)


@pytest.mark.parametrize("method", [JOINT, SEPARATE])
def test_a_refiner_equal_to_the_base_changes_nothing(method: RefinerSwapMethod) -> None:
    """Where the sampler keeps nothing from step to step."""
    for sampler in ("euler", "euler_ancestral", "heun", "dpmpp_sde", "lcm"):
        assert run(sampler=sampler, refiner=Refiner(tanh, 4, method))[0].equal(run(sampler=sampler)[0])


def test_separate_hands_over_noisy_latents() -> None:
    base, second = Model(), Model()
    run(base, sampler="euler", refiner=Refiner(second, 4, SEPARATE))
    sigmas = schedule("euler", "karras", 10).tolist()
    assert base.sigmas == sigmas[:4]
    assert second.sigmas == sigmas[4:10]
    dt = sigmas[4] - sigmas[3]
    assert torch.allclose(second.inputs[0], base.inputs[-1] + base.noise_pred() * dt, atol=1e-5)


def test_vae_noises_converted_latents_again() -> None:
    base, second = Model(0.5), Model(0.25)
    converted: list[Tensor] = []

    def convert(latents: Tensor) -> Tensor:
        converted.append(latents)
        return latents + 10.0

    run(base, refiner=Refiner(second, 4, VAE, convert=convert))
    sigmas = schedule("euler", "karras", 10)
    assert base.sigmas == sigmas[:4].tolist()
    assert second.sigmas == pytest.approx((1.4 * sigmas[4:10]).tolist())
    assert torch.allclose(converted[0], torch.full((1, *SHAPE), 0.5), atol=1e-5), "the first stage ends clean"
    noise = (second.inputs[0] - 10.5) / second.sigmas[0]
    fresh = RowNoise([1], SHAPE).normal()
    channel_mean = base.noise_pred().mean(1, keepdim=True)
    assert torch.allclose(noise, fresh - fresh.mean(1, keepdim=True) + channel_mean, atol=1e-4)


def test_vae_always_leaves_the_base_a_step() -> None:
    base, second = Model(), Model()
    run(base, refiner=Refiner(second, 0, VAE))
    assert (len(base.sigmas), len(second.sigmas)) == (1, 9)


def test_separate_at_step_0_is_the_refiner_alone() -> None:
    base = Model()
    assert run(base, refiner=Refiner(tanh, 0, SEPARATE))[0].equal(run(tanh)[0])
    assert base.sigmas == []


@pytest.mark.parametrize("method", [SEPARATE, VAE])
def test_stages_of_a_swap_share_one_brownian_path(method: RefinerSwapMethod, monkeypatch) -> None:
    noises: list[RowNoise] = []
    original = RowNoise.brownian

    def watched(self: RowNoise, sigma: float, sigma_next: float) -> Tensor:
        noises.append(self)
        return original(self, sigma, sigma_next)

    monkeypatch.setattr(RowNoise, "brownian", watched)
    base = Model()
    run(base, sampler="dpmpp_2m_sde", refiner=Refiner(tanh, 4, method))
    assert noises[0].brownian(1.0, 0.5).equal(noises[-1].brownian(1.0, 0.5))


def test_closing_a_run_stops_it() -> None:
    model = Model()
    started = sample(model, RowNoise([0], SHAPE), sampler="euler", scheduler="karras", steps=10)
    next(started), next(started)
    started.close()
    assert len(model.sigmas) == 2


def test_an_error_of_the_model_reaches_the_caller() -> None:
    def interrupted(x: Tensor, sigma: float) -> Tensor:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run(interrupted)


def test_same_seed_same_pixels_whatever_ran_before() -> None:
    first = run(sampler="dpmpp_2m_sde_gpu", steps=12)[0]
    run(sampler="euler_ancestral", seeds=(7,), steps=3)
    torch.manual_seed(99)
    assert run(sampler="dpmpp_2m_sde_gpu", steps=12)[0].equal(first)


@settings(max_examples=60, deadline=None)
@given(
    sampler=st.sampled_from(sorted(SamplerName)),
    scheduler=st.sampled_from(sorted(SchedulerName)),
    steps=st.integers(1, 40),
    strength=st.floats(0.05, 1.0),
    method=st.sampled_from([None, *RefinerSwapMethod]),
    switch_step=st.integers(0, 45),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_valid_run_ends_with_finite_latents(
    sampler, scheduler, steps: int, strength: float, method, switch_step: int, seed: int
) -> None:
    refiner = Refiner(tanh, switch_step, method) if method else None
    final, seen = run(
        tanh, (seed,), sampler=sampler, scheduler=scheduler, steps=steps, strength=strength, refiner=refiner
    )
    assert final.shape == (1, *SHAPE)
    assert final.isfinite().all()
    assert final.abs().max() < 200
    assert seen
    assert all(step.denoised.shape == (1, *SHAPE) for step in seen)
