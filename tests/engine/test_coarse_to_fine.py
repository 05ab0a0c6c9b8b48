"""A small model draws one thing in a picture of four times its pixels."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modules.engine.coarse_to_fine import FINE_SIGMA, CoarseToFine
from modules.engine.concepts import ConceptFinder
from modules.engine.condition import TextConditioner
from modules.engine.decode import decode_latents
from modules.engine.device import choose_policy
from modules.engine.drawing import Drawing
from modules.engine.journal import DenoisedJournal
from modules.engine.store import ModelStore, SdxlModel
from modules.engine.tokens import ClipTokenizer
from modules.plan import SamplingPlan, plan_sampling
from modules.request import GenerationRequest

MODELS = Path(__file__).parents[2] / "models"
THINGS = ("panda", "hamburger", "umbrella", "pizza", "rocket", "red apple", "tiger face", "octopus")


class Recorded:
    """A denoiser that knows the clean latents are their own mean, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, float]] = []
        self.dropped: list[int] = []
        self.evaluations, self.model_seconds = 0, 0.0

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        self.asked.append((x, sigma))
        self.evaluations += 1
        self.model_seconds += 0.5
        return x.mean((2, 3), keepdim=True).expand_as(x)

    def drop(self, image: int) -> None:
        self.dropped.append(image)


@pytest.fixture
def both() -> tuple[Recorded, Recorded]:
    return Recorded(), Recorded()


@pytest.mark.parametrize("factor", [2, 4])
def test_reduced_latents_are_as_noisy_as_the_model_is_told(both: tuple[Recorded, Recorded], factor: int) -> None:
    coarse, fine = both
    noise = torch.randn((2, 4, 64, 64), generator=torch.Generator().manual_seed(0))
    denoised = CoarseToFine(coarse, fine, factor)(3.0 + 8.0 * noise, 8.0)
    [(reduced, sigma)] = coarse.asked
    assert sigma == 8.0 / factor
    assert reduced.shape == (2, 4, 64 // factor, 64 // factor)
    assert float(reduced.std()) == pytest.approx(sigma, rel=0.05)
    assert denoised.shape == noise.shape
    torch.testing.assert_close(denoised.mean(), reduced.mean(), atol=1e-3, rtol=0)
    assert fine.asked == []


def test_latents_of_odd_size_keep_it(both: tuple[Recorded, Recorded]) -> None:
    assert CoarseToFine(*both, 2)(torch.ones(1, 4, 33, 17), 5.0).shape == (1, 4, 33, 17)


def test_edges_are_drawn_on_the_whole_latents(both: tuple[Recorded, Recorded]) -> None:
    coarse, fine = both
    x = torch.ones(1, 4, 32, 32)
    CoarseToFine(coarse, fine, 2)(x, FINE_SIGMA)
    assert coarse.asked == []
    assert fine.asked == [(x, FINE_SIGMA)]


def test_both_count_and_both_drop(both: tuple[Recorded, Recorded]) -> None:
    denoise = CoarseToFine(*both, 2)
    for sigma in (9.0, 0.1):
        denoise(torch.ones(1, 4, 32, 32), sigma)
    denoise.drop(1)
    assert (denoise.evaluations, denoise.model_seconds) == (2, 1.0)
    assert [one.dropped for one in both] == [[1], [1]]


@pytest.fixture(scope="module")
def model() -> SdxlModel:
    return ModelStore(choose_policy("cpu", precision="fp32")).base(MODELS / "embedded" / "focale-tiny.safetensors")


@pytest.fixture(scope="module")
def finder() -> ConceptFinder:
    return ConceptFinder(MODELS / "embedded" / "clip_vision")


def named(model: SdxlModel, finder: ConceptFinder, plan: SamplingPlan, folder: Path) -> int:
    """How many of the things are among the five likeliest names of their pictures."""
    conditioner = TextConditioner(ClipTokenizer(MODELS / "tokenizer"))
    right = 0
    for thing in THINGS:
        size = {"width": plan.width, "height": plan.height, "adm_scaler": 1.0}
        positive, negative = (conditioner.condition(model, (text,), **size) for text in (f"{thing}, 3d style", ""))
        drawing = Drawing(model, plan, positive=positive, negative=negative, seeds=[1])
        with DenoisedJournal(folder / f"{thing}{plan.coarse_factor}", identity=thing, shape=drawing.shape) as journal:
            run = drawing.run(journal)
            try:
                while True:
                    next(run)
            except StopIteration as end:
                (picture,) = decode_latents(model.vae, end.value, statistics=model.statistics)
        right += thing in [tag.name for tag in finder(picture, count=5)]
    return right


@pytest.mark.slow
@pytest.mark.engine
def test_the_embedded_model_draws_things_at_256_pixels(model: SdxlModel, finder: ConceptFinder, tmp_path: Path) -> None:
    request = GenerationRequest(
        aspect_ratios_selection="256*256", overwrite_step=12, guidance_scale=7, sampler_name="dpmpp_2m"
    )
    plan = plan_sampling(request, native_size_px=model.facts.native_size)
    assert plan.coarse_factor == 2
    whole = named(model, finder, replace(plan, coarse_factor=1), tmp_path)
    right = named(model, finder, plan, tmp_path)
    assert right >= len(THINGS) - 1
    assert whole <= len(THINGS) // 2
