"""Distils guidance and many steps into a LoRA: four to eight steps, no negative prompt.

Latent consistency distillation: Luo et al. 2023 (arXiv:2310.04378), alg. 1, with the LoRA as the student (Luo et al.
2023, arXiv:2311.05556) and the same weights without it as the teacher. Unlike there, the last steps are not consistent
with the clean picture but with the teacher's estimate of it.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.art import load_art
from training.captions import caption
from training.lora import LowRank, switched_off
from training.lora_stage import lora_parser, train_lora
from training.nets import alphas_cumprod
from training.prompts import Encoding, native_time_ids
from training.runs import in_processes, seeded
from training.stages import StateFolder, start_logging
from training.unet import Bucket, Choice, load_buckets

SKIP = 20
GUIDANCE_RANGE = (3.0, 7.0)
HUBER = 0.001
ANCHORED = (
    280  # below this timestep the target is the teacher's own clean estimate, or the student's errors add up to grain
)


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
            after, guided = self._teacher_step(noisy, step, wanted, empty)
            target = self._consistent(after, step.end, wanted)
            target = torch.where((step.start < ANCHORED).view(-1, 1, 1, 1), guided, target)
        error = self._consistent(noisy, step.start, wanted) - target
        return ((error.square() + HUBER**2).sqrt() - HUBER).mean()

    def _share(self, timesteps: Tensor) -> Tensor:
        """(B, 1, 1, 1) signal variance; 1 for the clean picture."""
        share = torch.where(timesteps < 0, 1.0, self._signal[timesteps.clamp(min=0)])
        return share.view(-1, 1, 1, 1)

    def _noise(self, latents: Tensor, timesteps: Tensor, encoding: Encoding) -> Tensor:
        conditions = {"text_embeds": encoding.pooled, "time_ids": native_time_ids(len(latents))}
        inputs = latents.to(encoding.hidden.dtype).contiguous(memory_format=torch.channels_last)
        predicted: Tensor = self._unet(inputs, timesteps, encoding.hidden, added_cond_kwargs=conditions).sample
        return predicted.float()

    def _consistent(self, latents: Tensor, timesteps: Tensor, encoding: Encoding) -> Tensor:
        keep, take = boundary(timesteps)
        noise = self._noise(latents, timesteps.clamp(min=0), encoding)
        return keep * latents + take * clean_estimate(latents, noise, self._share(timesteps.clamp(min=0)))

    def _teacher_step(self, latents: Tensor, step: Step, wanted: Encoding, empty: Encoding) -> tuple[Tensor, Tensor]:
        """Where a DDIM step of the teacher leads, guided row by row, and its clean estimate."""
        with switched_off(self._adapters):
            noise, plain = self._noise(latents, step.start, wanted), self._noise(latents, step.start, empty)
        low, high = GUIDANCE_RANGE
        guidance = low + (high - low) * torch.rand(len(latents), 1, 1, 1)
        noise = plain + guidance * (noise - plain)
        end = self._share(step.end)
        clean = clean_estimate(latents, noise, self._share(step.start))
        return end.sqrt() * clean + (1 - end).sqrt() * noise, clean


def train(arguments: argparse.Namespace) -> None:
    """One process of the stage."""
    state = StateFolder(arguments.state)
    art = load_art(state.file("art"))
    choice = Choice(limit=arguments.concepts, share=arguments.everyday)
    bucket = native_bucket(load_buckets(state.file("latents"), art, batch=arguments.batch, choice=choice))

    def make_loss(network: nn.ModuleDict, adapters: dict[str, LowRank], samples: int) -> Callable[[], Tensor]:
        rng = seeded(arguments.seed, "few", samples)
        trainer = ConsistencyTrainer(network["unet"], network["text"], adapters)

        def next_loss() -> Tensor:
            rows = bucket.curriculum.draw(arguments.batch, rng=rng)
            texts = []
            for row in rows:
                concept, style = art.items[bucket.cache.items[row]]
                texts.append(caption(art.concepts[concept], style, bucket.cache.colours[row], rng=rng))
            return trainer.loss(bucket.cache.latents[rows].float(), texts)

        return next_loss

    train_lora(arguments, name="few-step-lora", title="Focale few-step", make_loss=make_loss)


def native_bucket(buckets: list[Bucket]) -> Bucket:
    """The bucket with the largest square pictures."""
    return max(buckets, key=lambda bucket: (bucket.size_px[0] == bucket.size_px[1], bucket.size_px))


def main() -> None:
    """Distil and write the LoRA file."""
    start_logging()
    parser = lora_parser(__doc__, samples=30_000, rank=32, rate=5e-4)
    parser.add_argument("--everyday", type=float, default=None, help="share of everyday concepts, 0-1")
    in_processes(1, train, parser.parse_args())


if __name__ == "__main__":
    main()
