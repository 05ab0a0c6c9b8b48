"""Latents have the sizes and the scale of their model, and encoding an image is repeatable."""

import pytest
import torch

from modules.engine.device import choose_policy
from modules.engine.latents import (
    PLAYGROUND_LATENTS,
    LatentStatistics,
    crop_to_multiple,
    encode_pixels,
    latent_size,
    statistics_for,
    zero_latents,
)
from modules.engine.store import ModelStore, SdxlModel
from tests.tiny_sdxl import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SdxlModel:
    path = write_tiny(tmp_path_factory.mktemp("latents") / "tiny.safetensors")
    return ModelStore(choose_policy("cpu", precision="fp32")).base(path)


@pytest.mark.parametrize(
    ("width", "height", "size"), [(1152, 896, (112, 144)), (144, 112, (14, 18)), (100, 15, (1, 12))]
)
def test_latent_size_cuts_what_exceeds_eight_pixels(width: int, height: int, size: tuple[int, int]) -> None:
    assert latent_size(width, height) == size
    assert zero_latents(2, width, height).shape == (2, 4, *size)


def test_picture_without_a_latent_is_refused() -> None:
    with pytest.raises(ValueError, match="7×64 pixels is too small"):
        latent_size(7, 64)


@pytest.mark.parametrize("statistics", [LatentStatistics(0.13025), PLAYGROUND_LATENTS])
def test_model_space_and_back_is_the_identity(statistics: LatentStatistics) -> None:
    latents = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))

    torch.testing.assert_close(statistics.to_vae(statistics.to_model(latents)), latents)


def test_playground_latents_are_centred_and_scaled_by_channel() -> None:
    mean = torch.tensor([-1.6574, 1.886, -1.383, 2.5155]).view(1, 4, 1, 1)
    one_above = mean + torch.tensor([8.4927, 5.9022, 6.5498, 5.2299]).view(1, 4, 1, 1)

    torch.testing.assert_close(PLAYGROUND_LATENTS.to_model(mean), torch.zeros(1, 4, 1, 1))
    torch.testing.assert_close(PLAYGROUND_LATENTS.to_model(one_above), torch.full((1, 4, 1, 1), 0.5))


def test_crop_keeps_the_centre() -> None:
    pixels = torch.arange(21.0).expand(1, 3, 10, 21)

    cropped = crop_to_multiple(pixels)

    assert cropped.shape == (1, 3, 8, 16)
    assert cropped[0, 0, 0, 0] == 2  # (21 mod 8) // 2


@torch.inference_mode()
def test_encoding_repeats_with_its_seed(model: SdxlModel) -> None:
    pixels = torch.rand(1, 3, 40, 33, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def encode(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return encode_pixels(model.vae, pixels, statistics=model.statistics, generator=generator)

    assert encode(1).shape == (1, 4, 5, 4)
    assert torch.equal(encode(1), encode(1))
    assert not torch.equal(encode(1), encode(2))


def test_edm_scheduler_means_the_statistics_of_playground() -> None:
    assert statistics_for("edm_playground_v2.5", 0.13025) is PLAYGROUND_LATENTS
    assert statistics_for("karras", 0.18215) == LatentStatistics(0.18215)


@torch.inference_mode()
def test_tiled_encoding_is_close_to_encoding_whole(model: SdxlModel) -> None:
    coarse = torch.rand(1, 3, 10, 18, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixels = torch.nn.functional.interpolate(coarse, size=(320, 576), mode="bicubic").clamp(-1, 1)

    whole, tiled = (
        encode_pixels(
            model.vae,
            pixels,
            statistics=model.statistics,
            generator=torch.Generator().manual_seed(0),
            tiled=is_tiled,
        )
        for is_tiled in (False, True)
    )

    assert tiled.shape == whole.shape == (1, 4, 40, 72)
    assert (tiled - whole).std() < 0.2 * whole.std()


@torch.inference_mode()
def test_encoding_is_the_scaled_posterior(model: SdxlModel) -> None:
    pixels = torch.zeros(1, 3, 32, 32)
    ours = encode_pixels(model.vae, pixels, statistics=model.statistics, generator=torch.Generator().manual_seed(3))

    theirs = model.vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(3)) * 0.13025

    torch.testing.assert_close(ours, theirs)
