"""Encodes augmented pictures once, so that the UNet stages never run the VAE.

Each cache file holds latents of one picture size, with the picture's item and background colour.
"""

import json
import logging
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.art import ArtSet, load_art
from training.curriculum import read_labels
from training.nets import SCALING_FACTOR, load_vae
from training.pictures import CENTRED, compose, random_colour
from training.stages import StateFolder, stage_parser, start_logging

logger = logging.getLogger(__name__)

SQUARES = ((128, 128),)
OBLONGS = ((112, 144), (144, 112), (96, 160), (160, 96))
BATCH = 32


@dataclass(frozen=True)
class LatentCache:
    """Latents of one size.

    Attributes:
        latents: (N, 4, h, w) float16, times SCALING_FACTOR.
        items: index into the art set's items, per row.
        colours: name of the background, or None for white, per row.
    """

    latents: Tensor
    items: list[int]
    colours: list[str | None]


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """(B, 4, h, w) float16 latents, times SCALING_FACTOR, of (B, 3, 8h, 8w) pixels in −1…1."""
    parts = [part.contiguous(memory_format=torch.channels_last) for part in pixels.split(BATCH)]
    return torch.cat([(vae.encode(part).latent_dist.mean * SCALING_FACTOR).half().contiguous() for part in parts])


def encode_pictures(
    vae: AutoencoderKL, art: ArtSet, pictures: list[int], *, height: int, width: int, rng: random.Random
) -> LatentCache:
    """Latents of these pictures, each once, on random backgrounds."""
    colours = [random_colour(rng) for _ in pictures]
    rows = []
    for start in range(0, len(pictures), BATCH):
        chosen = slice(start, start + BATCH)
        pixels = compose(art, pictures[chosen], colours[chosen], rng=rng, height=height, width=width, placement=CENTRED)
        rows.append(encode_pixels(vae, pixels))
    return LatentCache(torch.cat(rows), list(pictures), colours)


def save_cache(cache: LatentCache, file: Path) -> None:
    """Write one cache file, whole or not at all."""
    header = {"items": json.dumps(cache.items), "colours": json.dumps(cache.colours)}
    partial = file.with_suffix(".partial")
    save_file({"latents": cache.latents}, partial, metadata=header)
    partial.replace(file)


def load_cache(file: Path) -> LatentCache:
    """Read one cache file."""
    with safe_open(file, "pt") as tensors:
        header = tensors.metadata()
        return LatentCache(tensors.get_tensor("latents"), json.loads(header["items"]), json.loads(header["colours"]))


def main() -> None:
    """Encode one more variant of every core picture at one size."""
    start_logging()
    torch.set_num_threads(1)
    parser = stage_parser(__doc__)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    arguments = parser.parse_args()
    state = StateFolder(arguments.state)
    art = load_art(state.file("art"))
    rng = random.Random(f"{arguments.height}x{arguments.width}:{arguments.seed}")
    labels = read_labels(arguments.only) if arguments.only else None
    pictures = art.pick(limit=arguments.concepts, labels=labels)
    rng.shuffle(pictures)
    vae = load_vae(state.file("vae")).to(memory_format=torch.channels_last)
    cache = encode_pictures(vae, art, pictures, height=arguments.height, width=arguments.width, rng=rng)
    file = state.file("latents", f"{arguments.height}x{arguments.width}-{arguments.seed}.safetensors")
    save_cache(cache, file)
    flat = cache.latents.float().transpose(0, 1).flatten(1)
    logger.info("%s: %d latents, std %s", file.name, len(cache.items), flat.std(1).tolist())


if __name__ == "__main__":
    main()
