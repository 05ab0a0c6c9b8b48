"""Noise levels agree with the published arrays, and their rules with each other."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modules.choices import SamplerName, SchedulerName
from modules.engine.sigmas import (
    BEYOND_EVERY_SIGMA,
    DISCARDS_PENULTIMATE,
    from_step,
    karras_sigmas,
    model_sampling_for,
    schedule,
    starts_from_pure_noise,
    until_step,
)
from tests.engine import golden

STANDARD = model_sampling_for("karras")
LCM = model_sampling_for("lcm")
EDM = model_sampling_for("edm_playground_v2.5")


def test_training_table() -> None:
    found = {index: float(STANDARD.sigmas[index]) for index in golden.TRAINING_SIGMAS}
    assert found == pytest.approx(golden.TRAINING_SIGMAS, rel=1e-6)


@pytest.mark.parametrize(("scheduler", "steps"), golden.SCHEDULES)
def test_schedule_gives_published_levels(scheduler: str, steps: int) -> None:
    levels = schedule("euler", scheduler, steps)
    assert levels.dtype == torch.float32
    assert levels.tolist() == pytest.approx(golden.values(golden.SCHEDULES[scheduler, steps]), abs=1e-5)


def test_every_scheduler_of_the_vocabulary_exists() -> None:
    for scheduler in SchedulerName:
        levels = schedule(SamplerName.EULER, scheduler, 10)
        assert levels[-1] == 0
        assert (levels[:-1] > levels[1:]).all()


@pytest.mark.parametrize(
    ("scheduler", "steps", "timesteps"),
    [
        ("karras", 30, golden.KARRAS_30_TIMESTEPS),
        ("lcm", 8, golden.LCM_8_TIMESTEPS),
        ("lcm", 4, golden.LCM_4_TIMESTEPS),
    ],
)
def test_timesteps_of_a_schedule(scheduler: str, steps: int, timesteps: str) -> None:
    found = model_sampling_for(scheduler).sigma_to_timestep(schedule("euler", scheduler, steps)[:-1])
    assert found.tolist() == [int(word) for word in timesteps.split()]


def test_playground_timesteps_are_continuous() -> None:
    found = EDM.sigma_to_timestep(schedule("euler", "edm_playground_v2.5", 8)[:-1])
    assert found.tolist() == pytest.approx(golden.values(golden.EDM_8_TIMESTEPS), abs=1e-4)


@pytest.mark.parametrize("model", [STANDARD, LCM], ids=["standard", "distilled"])
def test_timestep_of_a_table_level_is_its_place(model) -> None:
    timesteps = model.offset + model.stride * torch.arange(len(model.sigmas))
    assert model.sigma_to_timestep(model.sigmas).equal(timesteps)
    assert torch.allclose(model.timestep_to_sigma(timesteps), model.sigmas, rtol=1e-6)


@pytest.mark.parametrize("steps", [8, 18, 30, 60])
def test_ddim_uniform_reports_its_true_length(steps: int) -> None:
    assert len(schedule("euler", "ddim_uniform", steps)) == {8: 9, 18: 20, 30: 32, 60: 64}[steps]


def test_turbo_has_at_most_ten_steps() -> None:
    assert len(schedule("euler", "turbo", 20)) == 11


def test_strength_runs_the_requested_number_of_steps() -> None:
    levels = schedule("euler", "karras", 18, 0.382)
    assert levels.tolist() == pytest.approx(golden.values(golden.KARRAS_18_AT_0382), abs=1e-4)
    for strength, start in ((0.5, (1.2124, 1.0966, 0.9904)), (0.85, (7.7548, 6.7827, 5.9170))):
        levels = schedule("euler", "karras", 30, strength)
        assert len(levels) == 31
        assert levels[:3].tolist() == pytest.approx(start, abs=1e-4)


@pytest.mark.parametrize("sampler", sorted(DISCARDS_PENULTIMATE))
def test_some_samplers_leave_out_the_penultimate_level(sampler: str) -> None:
    levels = schedule(sampler, "karras", 8)
    assert levels.tolist() == pytest.approx(golden.values(golden.UNI_PC_KARRAS_8), abs=1e-4)


@pytest.mark.parametrize(
    ("model", "levels"), [(STANDARD, (3.32507, 1.61558, 0.34370)), (EDM, (4.42319, 0.48990, 0.00601))]
)
def test_percent_to_sigma(model, levels: tuple[float, ...]) -> None:
    assert [model.percent_to_sigma(p) for p in (0.3, 0.5, 0.9)] == pytest.approx(levels, abs=1e-4)
    assert model.percent_to_sigma(0.0) == BEYOND_EVERY_SIGMA
    assert model.percent_to_sigma(1.0) == 0.0


@pytest.mark.parametrize("model", [STANDARD, LCM, EDM], ids=["standard", "distilled", "playground"])
@pytest.mark.parametrize("percent", [0.05, 0.3, 0.5, 0.9])
def test_percent_and_sigma_are_inverse(model, percent: float) -> None:
    assert model.sigma_to_percent(model.percent_to_sigma(percent)) == pytest.approx(percent, abs=0.011)


def test_percent_of_a_run_goes_from_start_to_end() -> None:
    for model in (STANDARD, EDM):
        assert model.sigma_to_percent(model.sigma_max) == pytest.approx(0.0, abs=1e-6)
        assert model.sigma_to_percent(model.sigma_min) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "prediction", "denoised"),
    [
        ("lcm", "epsilon", -0.0853851),
        ("edm_playground_v2.5", "epsilon", 0.2765588),
        ("karras", "v_prediction", -0.3774964),
        ("karras", "epsilon", 2.0 - 4.17077 * 0.5),
        ("tcd", "epsilon", 2.0 - 4.17077 * 0.5),
    ],
)
def test_output_rules(scheduler: str, prediction, denoised: float) -> None:
    model = model_sampling_for(scheduler, prediction)
    found = model.denoised_from(torch.tensor(0.5), torch.tensor(2.0), 4.17077)
    assert float(found) == pytest.approx(denoised, abs=1e-5)


def test_scaled_input_has_the_variance_the_network_expects() -> None:
    assert float(EDM.scaled_input(torch.tensor(2.0), 4.17077)) == pytest.approx(0.4761185, abs=1e-6)
    assert float(STANDARD.scaled_input(torch.tensor(math.sqrt(17.0)), 4.0)) == pytest.approx(1.0)


def test_pure_noise_is_recognised_to_one_part_in_100_000() -> None:
    assert starts_from_pure_noise(torch.tensor([STANDARD.sigma_max * (1 - 5e-6), 0.0]), STANDARD)
    assert not starts_from_pure_noise(torch.tensor([STANDARD.sigma_max * (1 - 5e-5), 0.0]), STANDARD)
    assert starts_from_pure_noise(torch.tensor([20.0, 0.0]), STANDARD)


def test_two_stages_meet_at_one_level() -> None:
    levels = schedule("euler", "karras", 8)
    before, after = until_step(levels, 5), from_step(levels, 5)
    assert (len(before), len(after)) == (6, 4)
    assert before[-1] == after[0] > 0
    assert until_step(levels, 5, force_full_denoise=True)[-1] == 0
    assert levels[5] > 0, "cutting a schedule leaves the schedule as it was"
    assert until_step(levels, 20).equal(levels)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scheduler": "carras"}, "'carras' does not exist"),
        ({"steps": 0}, "at least 1 step"),
        ({"strength": 0.0}, "above 0"),
        ({"strength": 1.5}, "at most 1"),
    ],
)
def test_bad_values_are_named(values: dict, message: str) -> None:
    given_values = {"sampler": "euler", "scheduler": "karras", "steps": 8, "strength": 1.0, **values}
    with pytest.raises(ValueError, match=message):
        schedule(**given_values)


@given(
    sampler=st.sampled_from(sorted(SamplerName)),
    scheduler=st.sampled_from(sorted(SchedulerName)),
    steps=st.integers(1, 200),
    strength=st.floats(0.01, 1.0),
)
def test_levels_fall_to_zero(sampler: SamplerName, scheduler: SchedulerName, steps: int, strength: float) -> None:
    levels = schedule(sampler, scheduler, steps, strength)
    assert levels.isfinite().all()
    assert len(levels) >= 2
    assert levels[-1] == 0
    assert (levels[:-1] >= levels[1:]).all()
    assert levels[-2] > 0
    if scheduler not in ("turbo", "ddim_uniform"):
        assert len(levels) == steps + 1


@given(steps=st.integers(2, 100), low=st.floats(0.001, 0.5), high=st.floats(1.0, 200.0))
def test_karras_levels_keep_their_ends(steps: int, low: float, high: float) -> None:
    levels = karras_sigmas(steps, low, high)
    assert levels[0] == pytest.approx(high, rel=1e-5)
    assert levels[-2] == pytest.approx(low, rel=1e-5, abs=1e-6 * high)
