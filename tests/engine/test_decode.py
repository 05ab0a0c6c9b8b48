"""Latents become pictures: whole, in tiles without seams, and as quick previews."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from modules.engine.decode import (
    DECODE_OVERLAP,
    DECODE_TILES,
    LinearPreview,
    NetworkPreview,
    TranslatedPreview,
    decode_latents,
    to_images,
    to_pixels,
)
from modules.engine.device import choose_policy
from modules.engine.latents import PLAYGROUND_LATENTS, LatentStatistics, encode_pixels
from modules.engine.store import ModelStore, SdxlModel
from modules.engine.tiles import tiled_passes
from modules.engine.weights import LatentRgb
from modules.errors import ModelFileUnusable

EMBEDDED = Path(__file__).parents[2] / "models" / "embedded" / "focale-tiny.safetensors"


@pytest.fixture(scope="module")
def model() -> SdxlModel:
    """The embedded model: its VAE draws pictures smooth enough to compare."""
    return ModelStore(choose_policy("cpu", precision="fp32")).base(EMBEDDED)


def _smooth_latents(height: int, width: int) -> Tensor:
    coarse = torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(0))
    return functional.interpolate(coarse, size=(height, width), mode="bicubic") * 0.7


def test_pixels_are_truncated_and_not_rounded() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 0.9999, 1.0, 2.0]).view(1, 1, 1, 6).expand(1, 3, 1, 6)

    (image,) = to_images(pixels)

    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]


def test_pictures_and_pixels_are_inverse() -> None:
    array = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    pixels = to_pixels([Image.fromarray(array)] * 2)

    assert pixels.shape == (2, 3, 5, 7)
    difference = np.asarray(to_images(pixels)[1]).astype(int) - array
    assert set(difference.ravel().tolist()) <= {0, -1}  # truncation may lose one level


@torch.inference_mode()
def test_decoding_equals_the_vae_itself(model: SdxlModel) -> None:
    latents = _smooth_latents(16, 24)

    (image,) = decode_latents(model.vae, latents, statistics=model.statistics)

    expected = model.vae.decode(latents / 0.13025).sample.add(1).div(2).clamp(0, 1).mul(255).to(torch.uint8)
    assert image.size == (192, 128)
    assert np.array_equal(np.asarray(image), expected[0].permute(1, 2, 0).numpy())


@torch.inference_mode()
def test_rows_of_a_batch_are_decoded_like_single_pictures(model: SdxlModel) -> None:
    latents = torch.cat([_smooth_latents(16, 16), -_smooth_latents(16, 16)])

    both = decode_latents(model.vae, latents, statistics=model.statistics)
    alone = decode_latents(model.vae, latents[1:], statistics=model.statistics)

    difference = np.asarray(both[1]).astype(int) - np.asarray(alone[0])
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("size", [(8, 8), (70, 100), (131, 40)])
def test_tiles_of_an_exact_function_join_exactly(size: tuple[int, int]) -> None:
    tensor = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))

    def enlarge(tile: Tensor) -> Tensor:
        return functional.interpolate(tile, scale_factor=8.0)

    joined = tiled_passes(enlarge, tensor, DECODE_TILES, DECODE_OVERLAP, 8)

    torch.testing.assert_close(joined, enlarge(tensor), atol=1e-5, rtol=1e-5)


def test_tiles_of_a_shrinking_function_join_exactly() -> None:
    tensor = torch.rand(1, 3, 640, 1280, generator=torch.Generator().manual_seed(0))

    def shrink(tile: Tensor) -> Tensor:
        return functional.avg_pool2d(tile, 8)

    joined = tiled_passes(shrink, tensor, ((512, 512), (256, 1024), (1024, 256)), 64, 1 / 8)

    torch.testing.assert_close(joined, shrink(tensor), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.slow
@torch.inference_mode()
def test_latents_of_256_by_256_are_decoded_in_tiles() -> None:
    """2048×2048 pixels; a tile never holds more than a sixteenth of them."""
    vae = AutoencoderKL(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()
    largest = 0

    def note(_layer: object, _inputs: object, output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, output.numel() * output.element_size())

    vae.decoder.conv_norm_out.register_forward_hook(note)

    (image,) = decode_latents(vae, _smooth_latents(256, 256), statistics=LatentStatistics(0.13025), tiled=True)

    assert image.size == (2048, 2048)
    assert largest <= 4 * 4 * 2048 * 2048 / 16


def test_tiled_decoding_is_close_to_decoding_whole(model: SdxlModel) -> None:
    latents = _smooth_latents(40, 72)

    (whole,) = decode_latents(model.vae, latents, statistics=model.statistics)
    (tiled,) = decode_latents(model.vae, latents, statistics=model.statistics, tiled=True)

    error = np.asarray(whole).astype(float) - np.asarray(tiled)
    assert tiled.size == whole.size
    psnr = 10 * np.log10(255**2 / np.mean(error**2))
    assert psnr > 25, psnr  # the VAE's attention sees a tile instead of the picture


@torch.inference_mode()
def test_memory_that_runs_out_means_tiles(model: SdxlModel, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, sizes = type(model.vae).decode, []

    def limited(self: object, latents: Tensor, *rest: object) -> object:
        sizes.append(tuple(latents.shape[-2:]))
        if latents.shape[-1] > 64:
            raise torch.OutOfMemoryError
        return decode(self, latents, *rest)

    monkeypatch.setattr(type(model.vae), "decode", limited)
    monkeypatch.setattr("modules.engine.decode.DECODE_TILES", ((64, 64),))

    (image,) = decode_latents(model.vae, _smooth_latents(8, 72), statistics=model.statistics)

    assert image.size == (576, 64)
    assert sizes == [(8, 72), (8, 64), (8, 24)]


def test_linear_preview_is_a_quarter_of_the_picture() -> None:
    rgb = LatentRgb(((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)), (0.0, 0.0, 0.5))
    denoised = torch.zeros(4, 8, 12)
    denoised[0] = 1.0

    image = LinearPreview(rgb)(denoised)

    assert image.size == (24, 16)
    assert image.getpixel((5, 5)) == (255, 127, 191)


@torch.inference_mode()
def test_preview_of_the_embedded_model_resembles_its_picture(model: SdxlModel) -> None:
    picture = Image.new("RGB", (128, 128), "white")
    picture.paste((40, 90, 200), (24, 24, 104, 104))
    latents = encode_pixels(
        model.vae,
        to_pixels([picture]),
        statistics=model.statistics,
        generator=torch.Generator().manual_seed(0),
    )

    preview = LinearPreview(model.facts.latent_rgb)(latents[0])

    small = np.asarray(picture.resize((16, 16), Image.Resampling.BOX)).astype(float)
    colours = np.asarray(preview.resize((16, 16), Image.Resampling.BOX)).astype(float)
    assert np.corrcoef(small.ravel(), colours.ravel())[0, 1] > 0.6


def test_preview_of_another_model_space_shows_the_same_picture() -> None:
    sdxl = LatentStatistics(0.13025)
    preview = LinearPreview(LatentRgb(((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0))))
    plain = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * 4
    translated = TranslatedPreview(preview, known=sdxl, shown=PLAYGROUND_LATENTS)

    ours = np.asarray(translated(PLAYGROUND_LATENTS.to_model(plain)[0])).astype(int)

    assert np.abs(ours - np.asarray(preview(sdxl.to_model(plain)[0]))).max() <= 1


def _preview_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for index, (kernel, width, out) in enumerate(
        zip(NetworkPreview.KERNELS, NetworkPreview.CHANNELS, NetworkPreview.CHANNELS[1:], strict=False)
    ):
        fan_in = width * kernel * kernel
        weights[f"conv{index + 1}.weight"] = torch.randn(out, width, kernel, kernel, generator=generator) * fan_in**-0.5
        weights[f"conv{index + 1}.bias"] = torch.zeros(out)
    return weights


def test_network_preview_has_the_published_size_and_arithmetic(tmp_path: Path) -> None:
    weights = _preview_weights()
    torch.save(weights, tmp_path / "xlvaeapp.pth")
    denoised = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))

    image = NetworkPreview(tmp_path / "xlvaeapp.pth")(denoised)

    values = functional.pad(denoised.repeat_interleave(2, 1).repeat_interleave(2, 2), (11, 11, 11, 11))[None]
    for index in range(1, 9):
        values = functional.conv2d(values, weights[f"conv{index}.weight"], weights[f"conv{index}.bias"])
        values = functional.leaky_relu(values, 0.1)
    expected = (values * 127.5 + 127.5).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()
    assert sum(tensor.numel() for tensor in weights.values()) == 52_395
    assert np.abs(np.asarray(image).astype(int) - expected).max() <= 1


def test_file_that_is_no_preview_network_is_refused(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "x.safetensors")

    with pytest.raises(ModelFileUnusable, match="is not a preview decoder"):
        NetworkPreview(tmp_path / "x.safetensors")
