"""The denoiser composes a network, a noise rule and guidance, and adds nothing of its own."""

import time

import pytest
import torch
from torch import Tensor

from modules.engine.denoiser import Denoiser, ModelCall
from modules.engine.guidance import Guidance
from modules.engine.sigmas import ModelSampling, model_sampling_for
from tests.engine.networks import tiny_conditioning, tiny_unet

SIGMA = 4.17077
CFG = Guidance(7.0)
STANDARD = model_sampling_for("karras")


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


def noisy(batch: int = 1, seed: int = 9) -> Tensor:
    return torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) * SIGMA


def denoiser(unet, batch: int = 1, *, guidance: Guidance = CFG, negative_tokens: int = 77, **kwargs) -> Denoiser:
    positive = tiny_conditioning(1, batch)
    negative = tiny_conditioning(2, batch, negative_tokens)
    return Denoiser(unet, kwargs.pop("model", STANDARD), positive, negative, guidance, **kwargs)


class Recorder:
    """Stands before a UNet and keeps what goes in."""

    def __init__(self, unet) -> None:
        self.unet = unet
        self.calls: list[dict] = []

    def parameters(self):
        return self.unet.parameters()

    def modules(self):
        return self.unet.modules()

    def named_modules(self):
        return self.unet.named_modules()

    def __call__(self, sample, timestep, **kwargs):
        self.calls.append({"sample": sample, "timestep": timestep, **kwargs})
        known = {"encoder_hidden_states", "added_cond_kwargs", "return_dict"}
        return self.unet(sample, timestep, **{key: value for key, value in kwargs.items() if key in known})


def by_hand(unet, model: ModelSampling, x: Tensor, conditioning, sigma: float, *, late: bool) -> Tensor:
    """Clean latents of one conditioning, straight from the network."""
    time_ids = conditioning.consistent_time_ids if late else conditioning.time_ids
    with torch.inference_mode():
        output = unet(
            model.scaled_input(x, sigma),
            model.sigma_to_timestep(sigma),
            conditioning.prompt_embeds,
            added_cond_kwargs={"text_embeds": conditioning.pooled_prompt_embeds, "time_ids": time_ids},
            return_dict=False,
        )[0]
    return model.denoised_from(output, x, sigma)


@pytest.mark.parametrize("negative_tokens", [77, 154], ids=["one call", "two calls"])
@pytest.mark.parametrize("scheduler", ["karras", "lcm", "edm_playground_v2.5"])
def test_equals_the_formulas_applied_by_hand(unet, negative_tokens: int, scheduler: str) -> None:
    model, x = model_sampling_for(scheduler), noisy()
    late = float(model.sigma_to_timestep(SIGMA)) <= 699.3
    positive, negative = tiny_conditioning(1), tiny_conditioning(2, tokens=negative_tokens)
    d_pos = by_hand(unet, model, x, positive, SIGMA, late=late)
    d_neg = by_hand(unet, model, x, negative, SIGMA, late=late)
    found = denoiser(unet, negative_tokens=negative_tokens, model=model)(x, SIGMA)
    assert torch.allclose(found, d_neg + 7.0 * (d_pos - d_neg), atol=1e-4)


def test_equal_texts_share_one_call_and_others_are_never_repeated(unet) -> None:
    together, apart = Recorder(unet), Recorder(unet)
    denoiser(together, 2)(noisy(2), SIGMA)
    denoiser(apart, 2, negative_tokens=154)(noisy(2), SIGMA)
    assert [call["encoder_hidden_states"].shape[:2] for call in together.calls] == [(4, 77)]
    assert [call["encoder_hidden_states"].shape[:2] for call in apart.calls] == [(2, 77), (2, 154)]


def test_a_scale_of_one_evaluates_the_prompt_only(unet) -> None:
    recorder, x = Recorder(unet), noisy()
    neutral = Guidance(1.0, 1.0, 30.0)
    found = Denoiser(recorder, STANDARD, tiny_conditioning(1), None, neutral)(x, SIGMA)
    assert [len(call["sample"]) for call in recorder.calls] == [1]
    wanted = by_hand(unet, STANDARD, x, tiny_conditioning(1), SIGMA, late=False)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert denoiser(unet, guidance=neutral)(x, SIGMA).equal(found)


def test_guidance_without_a_negative_prompt_is_refused(unet) -> None:
    with pytest.raises(ValueError, match="needs a negative conditioning"):
        Denoiser(unet, STANDARD, tiny_conditioning(1), None, CFG)


@pytest.mark.parametrize(
    ("adm_end", "timestep", "emphasised"),
    [(0.3, 700, True), (0.3, 699, False), (0.0, 999, False), (1.0, 1, True), (1.0, 0, False)],
)
def test_size_numbers_switch_by_timestep(unet, adm_end: float, timestep: int, emphasised: bool) -> None:
    recorder = Recorder(unet)
    denoiser(recorder, adm_end=adm_end)(noisy(), float(STANDARD.sigmas[timestep]))
    assert recorder.calls[0]["timestep"] == timestep
    sizes = recorder.calls[0]["added_cond_kwargs"]["time_ids"]
    assert sizes.eq(192.0 if emphasised else 128.0).all()


def test_progress_reaches_the_guidance(unet) -> None:
    first, last = float(STANDARD.sigmas[999]), float(STANDARD.sigmas[0])
    adaptive, mimic, real = (
        denoiser(unet, guidance=guidance) for guidance in (Guidance(10.0, 7.0), Guidance(7.0), Guidance(10.0))
    )
    x = noisy()
    assert adaptive(x, first).equal(mimic(x, first))
    assert adaptive(x, last).equal(real(x, last))


def test_rows_equal_their_single_images(unet) -> None:
    x, positive, negative = noisy(3), tiny_conditioning(1, 3), tiny_conditioning(2, 3)
    batch = Denoiser(unet, STANDARD, positive, negative, Guidance(7.0, 5.0, 2.0))(x, 1.0)
    for row in range(3):
        part = slice(row, row + 1)
        one = [type(c)(*(value[part] for value in vars(c).values())) for c in (positive, negative)]
        single = Denoiser(unet, STANDARD, *one, Guidance(7.0, 5.0, 2.0))(x[part], 1.0)
        assert torch.allclose(single[0], batch[row], atol=1e-4)


def test_dropped_images_cost_nothing_and_others_do_not_notice(unet) -> None:
    recorder, x = Recorder(unet), noisy(3)
    whole, part = denoiser(unet, 3), denoiser(recorder, 3)
    part.drop(1)
    expected, found = whole(x, SIGMA), part(x, SIGMA)
    assert len(recorder.calls[0]["sample"]) == 4
    assert torch.allclose(found[[0, 2]], expected[[0, 2]], atol=1e-4)
    assert not found[1].any()
    part.drop(0)
    with pytest.raises(ValueError, match="cannot be dropped"):
        part.drop(2)
    with pytest.raises(ValueError, match="cannot be dropped"):
        part.drop(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_network_runs_in_its_own_format_and_the_rest_in_float32(dtype: torch.dtype) -> None:
    recorder = Recorder(tiny_unet(dtype=dtype))
    found = denoiser(recorder)(noisy(), SIGMA)
    call = recorder.calls[0]
    assert {call["sample"].dtype, call["encoder_hidden_states"].dtype} == {dtype}
    assert call["added_cond_kwargs"]["time_ids"].dtype == torch.float32, "bfloat16 cannot hold a size"
    assert found.dtype == torch.float32
    exact = denoiser(tiny_unet())(noisy(), SIGMA)
    assert float((found - exact).norm() / exact.norm()) < 0.2


def test_extras_see_the_call_and_add_to_it(unet) -> None:
    recorder, seen = Recorder(unet), []

    def extra(call: ModelCall) -> dict:
        seen.append(call)
        return {"mid_block_additional_residual": "residual"}

    denoiser(recorder, 2, extras=[extra], negative_tokens=154)(noisy(2), SIGMA)
    assert [call["mid_block_additional_residual"] for call in recorder.calls] == ["residual"] * 2
    assert [(call.images, call.positive) for call in seen] == [((0, 1), (True, True)), ((0, 1), (False, False))]
    assert seen[0].percent == pytest.approx(1 - float(seen[0].timestep) / 999)
    assert seen[0].sigma == SIGMA

    together = []
    denoiser(unet, 2, extras=[lambda call: together.append(call) or {}])(noisy(2), SIGMA)
    assert (together[0].images, together[0].positive) == ((0, 1, 0, 1), (True, True, False, False))


def test_check_ends_a_run_before_the_network_is_called(unet) -> None:
    recorder = Recorder(unet)

    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        denoiser(recorder, check=check)(noisy(), SIGMA)
    assert recorder.calls == []


def test_it_counts_evaluations_and_time_in_the_network(unet) -> None:
    class Slow(Recorder):
        def __call__(self, sample, timestep, **kwargs):
            time.sleep(0.02)
            return super().__call__(sample, timestep, **kwargs)

    denoise = denoiser(Slow(unet), negative_tokens=154)
    started = time.perf_counter()
    for _ in range(2):
        denoise(noisy(), SIGMA)
    assert denoise.evaluations == 2
    assert 0.08 <= denoise.model_seconds <= time.perf_counter() - started


def test_networks_without_a_vector_get_none(unet) -> None:
    class Plain:
        def parameters(self):
            return unet.parameters()

        def modules(self):
            return iter(())

        def named_modules(self):
            return iter(())

        def __call__(self, sample, timestep, *, encoder_hidden_states, added_cond_kwargs, return_dict):
            assert added_cond_kwargs is None
            return (sample * 0,)

    text = tiny_conditioning(1)
    bare = type(text)(text.prompt_embeds, text.pooled_prompt_embeds[:, :0], text.time_ids, text.time_ids)
    x = noisy()
    assert torch.allclose(Denoiser(Plain(), STANDARD, bare, bare, CFG)(x, SIGMA), x, atol=1e-5)


def test_results_can_be_worked_on(unet) -> None:
    """The network runs in inference mode, what leaves the denoiser does not."""
    for guidance in (CFG, Guidance(1.0)):
        denoised = denoiser(unet, guidance=guidance)(noisy(), SIGMA)
        assert not denoised.is_inference()
        denoised.add_(1.0)
