"""The embedded model draws what its prompt says, through the same code as any checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from modules.engine.condition import TextConditioner
from modules.engine.decode import decode_latents
from modules.engine.denoiser import Denoiser
from modules.engine.device import choose_policy
from modules.engine.guidance import Guidance
from modules.engine.latents import latent_size
from modules.engine.loras import LoraChoice
from modules.engine.noise import RowNoise
from modules.engine.sample import sample
from modules.engine.sigmas import model_sampling_for
from modules.engine.store import ModelStore, SdxlModel
from modules.engine.tensorfile import shard_parts
from modules.engine.tokens import ClipTokenizer
from modules.settings import Settings
from modules.tools import Toolbox

MODELS = Path(__file__).parents[2] / "models"
EMBEDDED = MODELS / "embedded" / "focale-tiny.safetensors"
LORAS = MODELS / "embedded" / "loras"
FEW_STEP_LORA, STYLE_LORA = LORAS / "focale-few-step.safetensors", LORAS / "focale-pixel-art.safetensors"
SIZE = 128


@pytest.fixture(scope="module")
def model() -> SdxlModel:
    return ModelStore(choose_policy("cpu", precision="fp32")).base(EMBEDDED)


@torch.inference_mode()
def _draw(
    model: SdxlModel,
    prompt: str,
    seeds: list[int],
    *,
    steps: int = 8,
    guidance_scale: float = 7.0,
    sampler: str = "dpmpp_2m",
    scheduler: str = "karras",
) -> list[NDArray[np.float64]]:
    """Pictures as (128, 128, 3) arrays of 0…255."""
    conditioner = TextConditioner(ClipTokenizer(MODELS / "tokenizer"))
    positive, negative = (
        conditioner.condition(model, (text,), width=SIZE, height=SIZE, adm_scaler=1.0).expand(len(seeds))
        for text in (prompt, "")
    )
    guidance = Guidance(guidance_scale)
    denoiser = Denoiser(model.unet, model_sampling_for(scheduler), positive, negative, guidance)
    noise = RowNoise(seeds, (4, *latent_size(SIZE, SIZE)), torch.device("cpu"))
    run = sample(denoiser, noise, sampler=sampler, scheduler=scheduler, steps=steps)
    try:
        while True:
            next(run)
    except StopIteration as end:
        images = decode_latents(model.vae, end.value, statistics=model.statistics)
    return [np.asarray(image).astype(np.float64) for image in images]


def test_words_choose_the_colours(model: SdxlModel) -> None:
    """Of a red and of a green apple, the middle is redder and greener, for each seed."""
    red = [picture[40:88, 40:88].mean((0, 1)) for picture in _draw(model, "red apple", [1, 2])]
    green = [picture[40:88, 40:88].mean((0, 1)) for picture in _draw(model, "green apple", [1, 2])]

    for red_middle, green_middle in zip(red, green, strict=True):
        assert red_middle[0] - red_middle[1] > 60
        assert green_middle[1] - green_middle[0] > 0


def test_same_seed_gives_the_same_pixels(model: SdxlModel) -> None:
    (first,) = _draw(model, "panda", [3])
    (again,) = _draw(model, "panda", [3])

    assert np.array_equal(first, again)


@pytest.mark.parametrize(
    ("sampler", "scheduler", "steps"),
    [("euler", "sgm_uniform", 4), ("lcm", "lcm", 8), ("dpmpp_sde_gpu", "karras", 4)],
    ids=["Lightning", "Extreme Speed", "Hyper-SD"],
)
def test_few_step_lora_stands_in_for_guidance(model: SdxlModel, sampler: str, scheduler: str, steps: int) -> None:
    """A panda is black and white; without the LoRA it stays grey, for want of guidance."""

    def contrast() -> float:
        drawn = _draw(model, "panda", [1, 2, 3], steps=steps, guidance_scale=1.0, sampler=sampler, scheduler=scheduler)
        return float(np.mean([picture.std() for picture in drawn]))

    without = contrast()
    with model.loras.merged([LoraChoice(FEW_STEP_LORA, 1.0)]) as (report,):
        assert not report.unmatched
        with_lora = contrast()
    assert with_lora > 1.08 * without


def test_pixel_art_lora_draws_cells(model: SdxlModel) -> None:
    """Within the cells of 8 px colours change less, and between them more, than without the LoRA."""

    def cellularity() -> float:
        across = [np.abs(np.diff(p, axis=1)).mean((0, 2)) for p in _draw(model, "a red apple, pixel art", [1, 2])]
        steps = np.mean(across, axis=0)
        return float(steps[7::8].mean() / steps.mean())

    plain = cellularity()
    with model.loras.merged([LoraChoice(STYLE_LORA, 1.0)]) as (report,):
        assert not report.unmatched
        assert cellularity() > 1.2 * plain


@pytest.mark.parametrize("thing", ["panda", "hamburger", "umbrella", "pizza", "rocket"])
def test_what_it_draws_is_named(thing: str, model: SdxlModel, settings: Settings, tmp_path: Path) -> None:
    (picture,) = _draw(model, f"{thing}, 3d style", [1], steps=12)
    Image.fromarray(picture.astype(np.uint8)).save(tmp_path / "drawn.png")
    kinds = {"image_path": str(tmp_path / "drawn.png"), "kinds": ["Photo", "Anime"]}
    article = "an" if thing[0] in "aeiou" else "a"
    words = Toolbox(settings.paths).run("describe", kinds)
    assert words.startswith(f"a drawing of {article} {thing}, in ")
    assert f" format, {thing}, drawing, " in words


def test_files_stay_small_enough_for_a_repository() -> None:
    assert [part.stat().st_size < 60_000_000 for part in shard_parts(EMBEDDED)] == [True, True]
    assert (MODELS / "embedded" / "NOTICE.md").read_text(encoding="utf-8").count("CC BY 4.0") >= 1
