"""The embedded model draws what its prompt says, through the same code as any checkpoint."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from modules.engine.condition import TextConditioner
from modules.engine.decode import decode_latents
from modules.engine.denoiser import Denoiser
from modules.engine.device import choose_policy
from modules.engine.guidance import Guidance
from modules.engine.latents import latent_size
from modules.engine.noise import RowNoise
from modules.engine.sample import sample
from modules.engine.sigmas import model_sampling_for
from modules.engine.store import ModelStore, SdxlModel
from modules.engine.tensorfile import shard_parts
from modules.engine.tokens import ClipTokenizer

MODELS = Path(__file__).parents[2] / "models"
EMBEDDED = MODELS / "embedded" / "focale-tiny.safetensors"
SIZE = 128


@pytest.fixture(scope="module")
def model() -> SdxlModel:
    return ModelStore(choose_policy("cpu", precision="fp32")).base(EMBEDDED)


@torch.inference_mode()
def _draw(model: SdxlModel, prompt: str, seeds: list[int]) -> list[NDArray[np.float64]]:
    """Pictures as (128, 128, 3) arrays of 0…255, 8 steps."""
    conditioner = TextConditioner(ClipTokenizer(MODELS / "tokenizer"))
    positive, negative = (
        conditioner.condition(model, (text,), width=SIZE, height=SIZE, adm_scaler=1.0).expand(len(seeds))
        for text in (prompt, "")
    )
    denoiser = Denoiser(model.unet, model_sampling_for("karras"), positive, negative, Guidance(7.0))
    noise = RowNoise(seeds, (4, *latent_size(SIZE, SIZE)), torch.device("cpu"))
    run = sample(denoiser, noise, sampler="dpmpp_2m", scheduler="karras", steps=8)
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


def test_files_stay_small_enough_for_a_repository() -> None:
    assert [part.stat().st_size < 60_000_000 for part in shard_parts(EMBEDDED)] == [True, True]
    assert (MODELS / "embedded" / "NOTICE.md").read_text(encoding="utf-8").count("CC BY 4.0") >= 1
