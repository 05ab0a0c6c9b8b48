"""Trains the style LoRA: pixel art, made from the training art by an image filter.

Captions end in "pixel art"; the base weights stay as they are.
"""

import argparse
import logging
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.engine.tensorfile import open_tensor_file
from training.art import ArtSet, load_art
from training.checkpoints import read_network, read_vae
from training.curriculum import Curriculum, read_labels
from training.latents import LatentCache, encode_pixels
from training.lora import adapt, kohya_tensors, save_lora
from training.nets import NATIVE_PX
from training.optim import Schedule
from training.pictures import compose, random_colour
from training.prompts import CHUNK
from training.runs import Run, in_processes, seeded
from training.stages import StateFolder, stage_parser, start_logging
from training.unet import Bucket, NoiseTrainer, TextPlan

logger = logging.getLogger(__name__)

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
    state = StateFolder(arguments.state)
    art = load_art(state.file("art"))
    labels = read_labels(arguments.only) if arguments.only else None
    rng = random.Random(arguments.seed)
    pictures = art.pick(limit=arguments.concepts, labels=labels)
    bucket = styled_bucket(arguments.weights, art, pictures, batch=arguments.batch, size_px=arguments.size, rng=rng)
    network = read_network(arguments.weights, arguments.vocabulary)
    torch.manual_seed(arguments.seed)
    network.requires_grad_(False)
    adapters = adapt(network["unet"], rank=arguments.rank)
    run = Run(state.file("runs", "style-lora"), network, minutes=arguments.minutes, muon_ratio=None)
    if arguments.resume:
        run.load()
    run.stop_on_signals()
    schedule = Schedule(arguments.rate, warmup=500, decay_from=arguments.samples // 2, decay_to=arguments.samples)
    own = seeded(arguments.seed, "style", run.samples)
    trainer = NoiseTrainer(network, art, shared=own, own=own, suffix=TRIGGER)
    while run.going(arguments.samples):
        loss = trainer.loss(bucket, TextPlan(CHUNK, 0, gradient=False))
        loss.backward()
        run.finish_step(arguments.batch, schedule.rate(run.samples))
        if run.steps % 25 == 0:
            logger.info("%d samples: loss %.4f", run.samples, float(loss.detach()))
    run.save()
    with run.average.applied():
        tensors = kohya_tensors(adapters, network["unet"], open_tensor_file(arguments.weights).shapes)
    save_lora(tensors, arguments.target, title=f"Focale {TRIGGER}", rank=arguments.rank)


def main() -> None:
    """Train and write the LoRA file."""
    start_logging()
    parser = stage_parser(__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint that the LoRA is for")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder with vocab.json and merges.txt")
    parser.add_argument("--target", type=Path, required=True, help="LoRA file to write")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--size", type=int, default=NATIVE_PX, help="side of the pictures in px")
    in_processes(1, train, parser.parse_args())


if __name__ == "__main__":
    main()
