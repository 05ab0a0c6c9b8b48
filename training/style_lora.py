"""Trains the style LoRA: pixel art, made from the training art by an image filter.

Captions end in "pixel art"; the base weights stay as they are.
"""

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.art import ArtSet, load_art
from training.checkpoints import read_vae
from training.curriculum import Curriculum, read_labels
from training.latents import LatentCache, encode_pixels
from training.lora import LowRank
from training.lora_stage import lora_parser, train_lora
from training.nets import NATIVE_PX
from training.pictures import compose, random_colour
from training.prompts import CHUNK
from training.runs import in_processes, seeded
from training.stages import StateFolder, start_logging
from training.unet import Bucket, NoiseTrainer, TextPlan

TRIGGER = "pixel art"
CELL_PX = 8
LEVELS = 5


def pixel_art(pixels: Tensor) -> Tensor:
    """(B, 3, h, w) in −1…1 as flat cells of 8 px in five brightness levels per colour."""
    cells = F.avg_pool2d(pixels, CELL_PX)
    levels = ((cells + 1) / 2 * (LEVELS - 1)).round() / (LEVELS - 1) * 2 - 1
    return F.interpolate(levels, scale_factor=CELL_PX, mode="nearest")


def styled_bucket(
    weights: Path, art: ArtSet, pictures: list[int], *, batch: int, size_px: int, rng: random.Random
) -> Bucket:
    """Latents of the filtered pictures, as a bucket for the noise trainer."""
    vae = read_vae(weights)
    colours = [random_colour(rng) for _ in pictures]
    parts = []
    for start in range(0, len(pictures), 32):
        chosen = slice(start, start + 32)
        pixels = compose(art, pictures[chosen], colours[chosen], rng=rng, height=size_px, width=size_px)
        parts.append(encode_pixels(vae, pixel_art(pixels)))
    cache = LatentCache(torch.cat(parts), pictures, colours)
    return Bucket(cache, Curriculum(art, pictures, everyday_share=None), batch)


def train(arguments: argparse.Namespace) -> None:
    """One process of the stage."""
    art = load_art(StateFolder(arguments.state).file("art"))
    labels = read_labels(arguments.only) if arguments.only else None
    rng = random.Random(arguments.seed)
    pictures = art.pick(limit=arguments.concepts, labels=labels)
    bucket = styled_bucket(arguments.weights, art, pictures, batch=arguments.batch, size_px=arguments.size, rng=rng)

    def make_loss(network: nn.ModuleDict, adapters: dict[str, LowRank], samples: int) -> Callable[[], Tensor]:
        own = seeded(arguments.seed, "style", samples)
        trainer = NoiseTrainer(network, art, shared=own, own=own, suffix=TRIGGER)
        return lambda: trainer.loss(bucket, TextPlan(CHUNK, 0, gradient=False))

    train_lora(arguments, name="style-lora", title=f"Focale {TRIGGER}", make_loss=make_loss)


def main() -> None:
    """Train and write the LoRA file."""
    start_logging()
    parser = lora_parser(__doc__, samples=20_000, rank=8, rate=1e-3)
    parser.add_argument("--size", type=int, default=NATIVE_PX, help="side of the pictures in px")
    in_processes(1, train, parser.parse_args())


if __name__ == "__main__":
    main()
