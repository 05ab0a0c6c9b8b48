"""Distils guidance and many steps into a LoRA: four to eight steps, no negative prompt.

Latent consistency distillation: Luo et al. 2023 (arXiv:2310.04378), alg. 1, with the LoRA as the student (Luo et al.
2023, arXiv:2311.05556) and the same weights without it as the teacher.
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from modules.engine.tensorfile import open_tensor_file
from training.art import load_art
from training.captions import caption
from training.checkpoints import read_network
from training.lora import LowRank, adapt, kohya_tensors, save_lora, switched_off
from training.nets import alphas_cumprod
from training.optim import Schedule
from training.prompts import Encoding, native_time_ids
from training.runs import Run, in_processes, seeded
from training.stages import StateFolder, stage_parser, start_logging
from training.unet import Bucket, Choice, load_buckets

logger = logging.getLogger(__name__)

SKIP = 20
GUIDANCE_RANGE = (3.0, 6.0)
HUBER = 0.001


@dataclass(frozen=True)
class Step:
    """A step of the teacher's solver.

    Attributes:
        start, end: (B,) timesteps; `end` is start − 20, or −1 for the clean picture.
    """

    start: Tensor
    end: Tensor


def draw_steps(count: int) -> Step:
    """Starts from the distilled grid 19, 39, … 999, evenly."""
    start = torch.randint(1, 1000 // SKIP + 1, (count,)) * SKIP - 1
    return Step(start, start - SKIP)


def clean_estimate(latents: Tensor, noise: Tensor, signal: Tensor) -> Tensor:
    """x0 from noisy latents and predicted noise; signal is the share of signal variance, (B, 1, 1, 1)."""
    return (latents - (1 - signal).sqrt() * noise) / signal.sqrt()


def boundary(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out, (B, 1, 1, 1): at timestep 0 the input itself, elsewhere nearly the network's estimate."""
    scaled = 10.0 * timesteps.clamp(min=0).float().view(-1, 1, 1, 1)
    return 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()


class ConsistencyTrainer:
    """The loss of one distillation step.

    Args:
        unet: with adapters on.
        text: frozen prompt encoder.
    """

    def __init__(self, unet: nn.Module, text: nn.Module, adapters: dict[str, LowRank]) -> None:
        self._unet, self._text, self._adapters = unet, text, adapters
        self._signal = alphas_cumprod()

    def loss(self, latents: Tensor, texts: list[str]) -> Tensor:
        """Pseudo-Huber distance between the student's estimates at both ends of a teacher step."""
        with torch.no_grad():
            wanted, empty = self._text(texts), self._text([""])
        empty = Encoding(empty.hidden.expand_as(wanted.hidden), empty.pooled.expand_as(wanted.pooled))
        step, noise = draw_steps(len(latents)), torch.randn_like(latents)
        start = self._share(step.start)
        noisy = start.sqrt() * latents + (1 - start).sqrt() * noise
        with torch.no_grad():
            after = self._teacher_step(noisy, step, wanted, empty)
            target = self._consistent(after, step.end, wanted)
            target = torch.where((step.end < 0).view(-1, 1, 1, 1), after, target)
        error = self._consistent(noisy, step.start, wanted) - target
        return ((error.square() + HUBER**2).sqrt() - HUBER).mean()

    def _share(self, timesteps: Tensor) -> Tensor:
        """(B, 1, 1, 1) signal variance; 1 for the clean picture."""
        share = torch.where(timesteps < 0, 1.0, self._signal[timesteps.clamp(min=0)])
        return share.view(-1, 1, 1, 1)

    def _noise(self, latents: Tensor, timesteps: Tensor, encoding: Encoding) -> Tensor:
        conditions = {"text_embeds": encoding.pooled, "time_ids": native_time_ids(len(latents))}
        predicted: Tensor = self._unet(latents, timesteps, encoding.hidden, added_cond_kwargs=conditions).sample
        return predicted

    def _consistent(self, latents: Tensor, timesteps: Tensor, encoding: Encoding) -> Tensor:
        keep, take = boundary(timesteps)
        noise = self._noise(latents, timesteps.clamp(min=0), encoding)
        return keep * latents + take * clean_estimate(latents, noise, self._share(timesteps.clamp(min=0)))

    def _teacher_step(self, latents: Tensor, step: Step, wanted: Encoding, empty: Encoding) -> Tensor:
        """One DDIM step of the guided teacher, each row with a guidance of its own."""
        with switched_off(self._adapters):
            noise, plain = self._noise(latents, step.start, wanted), self._noise(latents, step.start, empty)
        low, high = GUIDANCE_RANGE
        guidance = low + (high - low) * torch.rand(len(latents), 1, 1, 1)
        noise = plain + guidance * (noise - plain)
        end = self._share(step.end)
        return end.sqrt() * clean_estimate(latents, noise, self._share(step.start)) + (1 - end).sqrt() * noise


def train(arguments: argparse.Namespace) -> None:
    """One process of the stage."""
    state = StateFolder(arguments.state)
    art = load_art(state.file("art"))
    network = read_network(arguments.weights, arguments.vocabulary)
    torch.manual_seed(arguments.seed)
    network.requires_grad_(False)
    adapters = adapt(network["unet"], rank=arguments.rank)
    run = Run(state.file("runs", "few-step-lora"), network, minutes=arguments.minutes, muon_ratio=None)
    if arguments.resume:
        run.load()
    run.stop_on_signals()
    choice = Choice(limit=arguments.concepts, share=arguments.everyday)
    bucket = native_bucket(load_buckets(state.file("latents"), art, batch=arguments.batch, choice=choice))
    schedule = Schedule(arguments.rate, warmup=500, decay_from=arguments.samples // 2, decay_to=arguments.samples)
    rng = seeded(arguments.seed, "few", run.samples)
    trainer = ConsistencyTrainer(network["unet"], network["text"], adapters)
    while run.going(arguments.samples):
        rows = bucket.curriculum.draw(arguments.batch, rng=rng)
        texts = []
        for row in rows:
            concept, style = art.items[bucket.cache.items[row]]
            texts.append(caption(art.concepts[concept], style, bucket.cache.colours[row], rng=rng))
        loss = trainer.loss(bucket.cache.latents[rows].float(), texts)
        loss.backward()
        run.finish_step(arguments.batch, schedule.rate(run.samples))
        if run.steps % 25 == 0:
            logger.info("%d samples: loss %.4f", run.samples, float(loss.detach()))
    run.save()
    with run.average.applied():
        tensors = kohya_tensors(adapters, network["unet"], open_tensor_file(arguments.weights).shapes)
    save_lora(tensors, arguments.target, title="Focale few-step", rank=arguments.rank)


def native_bucket(buckets: list[Bucket]) -> Bucket:
    """The bucket with the largest square pictures."""
    return max(buckets, key=lambda bucket: (bucket.size_px[0] == bucket.size_px[1], bucket.size_px))


def main() -> None:
    """Distil and write the LoRA file."""
    start_logging()
    parser = stage_parser(__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint that the LoRA is for")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder with vocab.json and merges.txt")
    parser.add_argument("--target", type=Path, required=True, help="LoRA file to write")
    parser.add_argument("--samples", type=int, default=30_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--everyday", type=float, default=None, help="share of everyday concepts, 0-1")
    in_processes(1, train, parser.parse_args())


if __name__ == "__main__":
    main()
