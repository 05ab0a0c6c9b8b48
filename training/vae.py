"""Trains the VAE on the training styles, and measures it on the style that it never sees.

Small crops for most of the time, whole pictures at the end. The pooled colour terms keep it from spending its four
channels on brightness alone.
"""

import argparse
import logging
import math
import random
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from training.art import HELD_OUT_STYLE, TRAINING_STYLES, UNSEEN_STYLE, ArtSet, Style, load_art
from training.latents import encode_pixels
from training.nets import SCALING_FACTOR, load_vae, new_vae
from training.optim import Schedule, rank, world_size
from training.pictures import AUGMENTED, compose, random_colour
from training.precision import add_precision_option, chosen_dtype, prepare
from training.runs import Run, averaged_weights, in_processes, seeded
from training.stages import StateFolder, stage_parser, start_logging
from training.whiten import fold, whitening

logger = logging.getLogger(__name__)

KL_WEIGHT = 1e-3
CROP_PX = 64
HELD_OUT_CONCEPTS = 0.03


def edge_difference(one: Tensor, other: Tensor) -> Tensor:
    """Mean absolute difference of horizontal and vertical gradients."""
    error = one - other
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def chroma(pixels: Tensor) -> Tensor:
    """(B, 3, h, w) without the mean over the colours."""
    return pixels - pixels.mean(1, keepdim=True)


def reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Absolute, squared and edge differences at three scales, and squared differences of pooled colour."""
    error = decoded - pixels
    pooled8, pooled4 = F.avg_pool2d(error, 8), F.avg_pool2d(error, 4)
    loss = error.abs().mean() + error.square().mean() + 0.5 * edge_difference(decoded, pixels)
    loss = loss + 6 * pooled8.square().mean() + 12 * chroma(pooled8).square().mean()
    loss = loss + 2 * chroma(pooled4).abs().mean()
    for _ in range(2):
        decoded, pixels = F.avg_pool2d(decoded, 2), F.avg_pool2d(pixels, 2)
        loss = loss + 0.5 * (decoded - pixels).abs().mean() + 0.25 * edge_difference(decoded, pixels)
    return loss


def psnr(decoded: Tensor, pixels: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in −1…1, over all pictures together."""
    return 10 * math.log10(4 / float((decoded - pixels).square().mean()))


def held_out_concepts(art: ArtSet, seed: int) -> frozenset[int]:
    """A seeded 3 % of the concepts, which the VAE is not trained on in any style."""
    count = max(1, round(HELD_OUT_CONCEPTS * len(art.concepts)))
    return frozenset(random.Random(f"held out:{seed}").sample(range(len(art.concepts)), count))


@torch.no_grad()
def measure(vae: AutoencoderKL, art: ArtSet, *, style: Style, count: int = 64, seed: int = 0) -> float:
    """PSNR in dB of whole native pictures of one style on fresh backgrounds."""
    rng = random.Random(seed)
    pictures = art.pick(styles=(style,))
    pictures = rng.sample(pictures, min(count, len(pictures)))
    pixels = compose(art, pictures, [random_colour(rng) for _ in pictures], rng=rng)
    decoded = [vae.decode(vae.encode(part).latent_dist.mean).sample.clamp(-1, 1) for part in pixels.split(16)]
    return psnr(torch.cat(decoded), pixels)


def crops(pixels: Tensor, rng: random.Random) -> Tensor:
    """One random 64 px crop of each picture."""
    limit = pixels.shape[-1] - CROP_PX
    corners = [(rng.randint(0, limit), rng.randint(0, limit)) for _ in pixels]
    return torch.stack([p[:, y : y + CROP_PX, x : x + CROP_PX] for p, (y, x) in zip(pixels, corners, strict=True)])


def vae_loss(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Reconstruction from sampled latents, and a slight pull of these towards the unit Gaussian.

    The networks are called by part: the wrapper's checks cost more than they say here.
    """
    dtype = vae.quant_conv.weight.dtype
    mean, log_variance = vae.quant_conv(vae.encoder(pixels.to(dtype))).float().chunk(2, dim=1)
    log_variance = log_variance.clamp(-20, 10)
    latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    decoded = vae.decoder(vae.post_quant_conv(latents.to(dtype))).float()
    # the latents' scale is folded in, so the divergence is taken of scaled latents
    scaled = mean * SCALING_FACTOR
    shift = 2 * math.log(SCALING_FACTOR)
    divergence = 0.5 * (scaled.square() + (log_variance + shift).exp() - 1 - log_variance - shift).sum((1, 2, 3))
    return reconstruction_loss(decoded, pixels) + KL_WEIGHT * divergence.mean() / pixels[0].numel()


def train(arguments: argparse.Namespace) -> None:
    """One process of the stage."""
    state = StateFolder(arguments.state)
    art = load_art(state.file("art"))
    torch.manual_seed(arguments.seed)
    vae = load_vae(arguments.start) if arguments.start else new_vae()
    vae.encoder.requires_grad_(not arguments.decoder_only)
    vae.quant_conv.requires_grad_(not arguments.decoder_only)
    prepare(vae, chosen_dtype(arguments.precision))
    run = Run(state.file("runs", "vae"), nn.ModuleDict({"vae": vae}), minutes=arguments.minutes, muon_ratio=None)
    if arguments.resume:
        run.load()
    run.stop_on_signals()
    schedule = Schedule(arguments.rate, warmup=2000, decay_from=arguments.samples // 4, decay_to=arguments.samples)
    held_out = held_out_concepts(art, arguments.seed)
    pictures = [i for i in art.pick(core=False, limit=arguments.concepts) if art.items[i][0] not in held_out]
    rng = seeded(arguments.seed, "vae", run.samples)
    while run.going(arguments.samples):
        whole = run.samples > 0.7 * arguments.samples
        count = max(1, arguments.batch // 3) if whole else arguments.batch
        chosen = rng.choices(pictures, k=count)
        placement = replace(AUGMENTED, scale=(0.7, 1.0))
        pixels = compose(art, chosen, [random_colour(rng) for _ in chosen], rng=rng, placement=placement)
        pixels = pixels if whole else crops(pixels, rng)
        loss = vae_loss(vae, pixels.contiguous(memory_format=torch.channels_last))
        loss.backward()
        run.finish_step(count * world_size(), schedule.rate(run.samples))
        if rank() == 0 and run.steps % 50 == 0:
            logger.info("%d samples: loss %.4f", run.samples, float(loss.detach()))
    run.save()
    if rank() == 0:
        finish(state, art, vae.float(), whiten=not arguments.decoder_only)


def finish(state: StateFolder, art: ArtSet, vae: AutoencoderKL, *, whiten: bool) -> None:
    """Store the averaged VAE, its latents whitened if asked, and log what it keeps of each style."""
    weights = averaged_weights(state.file("runs", "vae", "checkpoint.pt"))
    vae.load_state_dict({name.removeprefix("vae."): weight for name, weight in weights.items()}, strict=False)
    vae.eval()
    if whiten:
        rng = random.Random(0)
        pictures = art.pick()
        pictures = rng.sample(pictures, min(192, len(pictures)))
        pixels = compose(art, pictures, [random_colour(rng) for _ in pictures], rng=rng)
        fold(vae, *whitening(encode_pixels(vae, pixels).float() / SCALING_FACTOR))
    vae.save_pretrained(state.file("vae"))
    report(vae, state)


def report(vae: AutoencoderKL, state: StateFolder) -> dict[Style, float]:
    """Log and return the PSNR of every style in dB; of the unseen one if its pictures were built."""
    art = load_art(state.file("art"))
    values: dict[Style, float] = {style: measure(vae, art, style=style) for style in (*TRAINING_STYLES, HELD_OUT_STYLE)}
    if state.file("unseen", "index.json").exists():
        values[UNSEEN_STYLE] = measure(vae, load_art(state.file("unseen")), style=UNSEEN_STYLE)
    notes: dict[Style, str] = {HELD_OUT_STYLE: " (held out here)", UNSEEN_STYLE: " (never seen)"}
    for style, value in values.items():
        logger.info("PSNR %s: %.2f dB%s", style, value, notes.get(style, ""))
    return values


def main() -> None:
    """Train, whiten and measure; or only measure."""
    start_logging()
    parser = stage_parser(__doc__)
    parser.add_argument("--start", type=Path, default=None, help="diffusers folder to start from")
    parser.add_argument("--decoder-only", action="store_true", help="keep the latents as they are")
    parser.add_argument("--samples", type=int, default=400_000, help="crops or pictures in all")
    parser.add_argument("--batch", type=int, default=20, help="crops per process and step")
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--processes", type=int, default=2)
    add_precision_option(parser)
    parser.add_argument("--measure", action="store_true", help="only measure the state folder's VAE")
    arguments = parser.parse_args()
    if arguments.measure:
        state = StateFolder(arguments.state)
        report(load_vae(state.file("vae")), state)
    else:
        in_processes(arguments.processes, train, arguments)


if __name__ == "__main__":
    main()
