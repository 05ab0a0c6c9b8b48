"""Latents: sizes, the empty start of text to image, and images encoded by the VAE."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from modules.engine.formats import computed_format
from modules.engine.tiles import tiled_passes

Latents: TypeAlias = Tensor  # (B, 4, h, w) float32 in model space
LATENT_CHANNELS = 4
LATENT_SCALE = 8  # pixels per latent, each way
ENCODE_TILES = ((512, 512), (256, 1024), (1024, 256))  # (rows, columns) of pixels, one pass each
ENCODE_OVERLAP = 64
EDM_SCHEDULER = "edm_playground_v2.5"


@dataclass(frozen=True)
class LatentStatistics:
    """How the VAE's own latents become model space, where the UNet works: (latents − mean) · scale / std."""

    scale: float
    mean: tuple[float, float, float, float] | None = None
    std: tuple[float, float, float, float] | None = None

    def to_model(self, latents: Tensor) -> Tensor:
        """Latents as the VAE encodes them → model space; (B, 4, h, w) both."""
        if self.mean is None or self.std is None:
            return latents * self.scale
        return (latents - _channels(self.mean, latents)) * (self.scale / _channels(self.std, latents))

    def to_vae(self, latents: Tensor) -> Tensor:
        """Model space → latents as the VAE decodes them."""
        if self.mean is None or self.std is None:
            return latents / self.scale
        return latents * (_channels(self.std, latents) / self.scale) + _channels(self.mean, latents)


PLAYGROUND_LATENTS = LatentStatistics(
    scale=0.5,
    mean=(-1.6574, 1.886, -1.383, 2.5155),
    std=(8.4927, 5.9022, 6.5498, 5.2299),
)


def statistics_for(scheduler: str, scaling_factor: float) -> LatentStatistics:
    """The model space of a run: Playground's with the EDM scheduler, else the checkpoint's own."""
    return PLAYGROUND_LATENTS if scheduler == EDM_SCHEDULER else LatentStatistics(scaling_factor)


def _channels(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


def latent_size(width: int, height: int) -> tuple[int, int]:
    """(h, w) of the latents of a picture of width × height pixels; what exceeds a multiple of 8 is cut off.

    Raises:
        ValueError: a side is smaller than 8 pixels.
    """
    if min(width, height) < LATENT_SCALE:
        raise ValueError(f"A picture of {width}×{height} pixels is too small: each side needs at least 8.")
    return height // LATENT_SCALE, width // LATENT_SCALE


def zero_latents(batch: int, width: int, height: int, *, device: torch.device | str = "cpu") -> Tensor:
    """(batch, 4, height // 8, width // 8) float32 zeros in model space: the start of text to image."""
    return torch.zeros(batch, LATENT_CHANNELS, *latent_size(width, height), device=device)


def encode_pixels(
    vae: AutoencoderKL,
    pixels: Tensor,
    *,
    statistics: LatentStatistics,
    generator: torch.Generator,
    tiled: bool = False,
) -> Tensor:
    """Latents of pictures, a sample of the VAE's posterior drawn with `generator`.

    Args:
        pixels: (B, 3, H, W) in −1…1; sides that are no multiple of 8 are cropped in the centre.
        generator: CPU generator; the same seed gives the same latents on any device.
        tiled: encode in three passes of overlapping tiles, which needs little memory.
    Returns:
        (B, 4, H // 8, W // 8) float32 in model space, on the VAE's device.
    """
    cropped = crop_to_multiple(pixels).to(device=vae.device, dtype=computed_format(vae))
    if tiled:
        moments = tiled_passes(
            lambda tile: _moments(vae, tile), cropped, ENCODE_TILES, ENCODE_OVERLAP, 1 / LATENT_SCALE
        )
    else:
        moments = _moments(vae, cropped)
    mean, std = moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return statistics.to_model(mean + std * noise)


def _moments(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """(B, 8, h, w): mean and standard deviation of the VAE's posterior, its logarithm of the variance clamped."""
    posterior = vae.encode(pixels).latent_dist
    return torch.cat([posterior.mean.float(), posterior.std.float()], dim=1)


def crop_to_multiple(pixels: Tensor, multiple: int = LATENT_SCALE) -> Tensor:
    """The centre of a (B, C, H, W) tensor whose sides are multiples of `multiple`."""
    height, width = pixels.shape[-2:]
    top, left = height % multiple // 2, width % multiple // 2
    return pixels[..., top : top + height // multiple * multiple, left : left + width // multiple * multiple]
