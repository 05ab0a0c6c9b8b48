"""Latents to pictures: the VAE whole or in tiles, and quick previews of unfinished latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from modules.engine.formats import computed_format
from modules.engine.latents import LATENT_SCALE, LatentStatistics
from modules.engine.tensorfile import open_tensor_file
from modules.engine.tiles import tiled_passes
from modules.engine.weights import LatentRgb
from modules.errors import ModelFileUnusable

DECODE_TILES = ((64, 64), (128, 32), (32, 128))  # (rows, columns) of latents, one pass each
DECODE_OVERLAP = 16
PREVIEW_SCALE = 2  # preview pixels per latent: a quarter of the picture


def decode_latents(
    vae: AutoencoderKL,
    latents: Tensor,
    *,
    statistics: LatentStatistics,
    tiled: bool = False,
) -> list[Image.Image]:
    """Decodes latents to RGB pictures, 8 pixels per latent each way.

    Args:
        latents: (B, 4, h, w) float32, model space.
        tiled: decode in three passes of overlapping tiles, which needs little memory. Also the answer to a
            device that runs out of memory when decoding whole.
    """
    plain = statistics.to_vae(latents).to(device=vae.device, dtype=computed_format(vae))
    if not tiled:
        try:
            return to_images(vae.decode(plain).sample)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    return to_images(
        tiled_passes(lambda tile: _decode_tile(vae, tile), plain, DECODE_TILES, DECODE_OVERLAP, LATENT_SCALE)
    )


def _decode_tile(vae: AutoencoderKL, tile: Tensor) -> Tensor:
    decoded: Tensor = vae.decode(tile).sample
    return decoded


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in −1…1 → RGB pictures; values are cut off at the ends and truncated to whole numbers."""
    scaled = ((pixels.float() + 1.0) / 2.0).clamp_(0.0, 1.0).mul_(255.0)
    arrays = scaled.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def to_pixels(images: Sequence[Image.Image], *, device: torch.device | str = "cpu") -> Tensor:
    """RGB pictures of one size → (B, 3, H, W) float32 in −1…1."""
    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stacked).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


class Preview(Protocol):
    """Draws a quick picture, a quarter of the final size, from denoised latents."""

    def __call__(self, denoised: Tensor) -> Image.Image:
        """(4, h, w) in model space → RGB picture of 2h × 2w pixels."""
        ...


@dataclass(frozen=True)
class TranslatedPreview:
    """A preview that knows one model space, for latents of another: Playground's, drawn by SDXL's preview.

    known: the space of `preview`. shown: the space of the latents it is given.
    """

    preview: Preview
    known: LatentStatistics
    shown: LatentStatistics

    def __call__(self, denoised: Tensor) -> Image.Image:
        """(4, h, w) in the shown space → RGB picture."""
        latents: Tensor = self.known.to_model(self.shown.to_vae(denoised[None]))[0]
        return self.preview(latents)


class LinearPreview:
    """A preview by one linear map from latents to colours."""

    def __init__(self, rgb: LatentRgb) -> None:
        self._factors = torch.tensor(rgb.factors, dtype=torch.float32).t()
        self._bias = torch.tensor(rgb.bias, dtype=torch.float32).view(3, 1, 1)

    def __call__(self, denoised: Tensor) -> Image.Image:
        latents = denoised.float().cpu()
        colours = torch.einsum("rc,chw->rhw", self._factors, latents) + self._bias
        small = to_images(colours[None])[0]
        return small.resize((small.width * PREVIEW_SCALE, small.height * PREVIEW_SCALE), Image.Resampling.BILINEAR)


class NetworkPreview(nn.Module):
    """A preview by the small convolutional decoder published as `vae-approx`."""

    CHANNELS = (4, 8, 16, 32, 64, 32, 16, 8, 3)
    KERNELS = (7, 5, 3, 3, 3, 3, 3, 3)
    MARGIN = 11  # zeros around the doubled latents: what the eight kernels eat up

    def __init__(self, path: Path) -> None:
        """Reads `conv1`…`conv8` from a file.

        Raises:
            ModelFileMissing, ModelFileUnusable: no such file, or not of this build.
        """
        super().__init__()
        for index, kernel in enumerate(self.KERNELS):
            layer = nn.Conv2d(self.CHANNELS[index], self.CHANNELS[index + 1], kernel)
            self.add_module(f"conv{index + 1}", layer)
        file = open_tensor_file(path)
        try:
            self.load_state_dict({name: file.read(name).float() for name in file.shapes})
        except RuntimeError as error:
            raise ModelFileUnusable(f"{path.name!r} is not a preview decoder (vae-approx).") from error
        self.requires_grad_(False).eval()

    def forward(self, denoised: Tensor) -> Image.Image:
        doubled = functional.interpolate(denoised[None].float(), scale_factor=float(PREVIEW_SCALE))
        values = functional.pad(doubled, (self.MARGIN,) * 4)
        for layer in self.children():
            values = functional.leaky_relu(layer(values), 0.1)
        return to_images(values)[0]
