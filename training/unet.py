"""Trains the UNet, and the text towers with it, to predict the noise in cached latents.

Importance-sampled timesteps with min-SNR weights: Hang et al. 2023 (arXiv:2303.09556), gamma 5.
"""

import argparse
import logging
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from training.art import ArtSet, load_art
from training.captions import caption, filler_words
from training.curriculum import Curriculum, read_labels
from training.latents import LatentCache, load_cache
from training.nets import (
    DOWNSCALE,
    NATIVE_PX,
    TRAIN_STEPS,
    alphas_cumprod,
    load_token_tables,
    new_text_towers,
    new_unet,
)
from training.optim import Schedule, rank, world_size
from training.precision import add_precision_option, chosen_dtype, prepare
from training.prompts import CHUNK, Encoding, PromptEncoder, consistent_time_ids, joined, scaled_time_ids
from training.runs import Run, averaged_weights, in_processes, seeded
from training.stages import StateFolder, stage_parser, start_logging

logger = logging.getLogger(__name__)

SNR_GAMMA = 5.0
UNIFORM_SHARE = 0.15
EMPTY_SHARE = 0.10
SHORT, MEDIUM = 24, 32
NEGATIVE_WORDS = (
    "blurry",
    "low quality",
    "worst quality",
    "ugly",
    "deformed",
    "noisy",
    "watermark",
    "text",
    "bad anatomy",
    "unrealistic",
    "photo",
    "lowres",
)


@dataclass(frozen=True)
class Noising:
    """How timesteps are drawn.

    Attributes:
        signal: (1000,) share of signal variance.
        probabilities: (1000,) of each timestep.
        weights: (1000,) factor of the squared error, so that the mean is the min-SNR-weighted loss.
    """

    signal: Tensor
    probabilities: Tensor
    weights: Tensor


def min_snr_noising() -> Noising:
    """Timesteps drawn mostly by their min-SNR weight, partly evenly."""
    signal = alphas_cumprod()
    ratio = signal / (1 - signal)
    wanted = ratio.clamp(max=SNR_GAMMA) / ratio
    probabilities = (1 - UNIFORM_SHARE) * wanted / wanted.sum() + UNIFORM_SHARE / TRAIN_STEPS
    weights = wanted / probabilities
    return Noising(signal, probabilities, weights / (weights * probabilities).sum())


@dataclass(frozen=True)
class Bucket:
    """All cached latents of one size.

    Attributes:
        cache: every variant of every picture.
        curriculum: draws rows of it.
        batch: pictures per process and step.
    """

    cache: LatentCache
    curriculum: Curriculum
    batch: int

    @property
    def size_px(self) -> tuple[int, int]:
        """Height and width of the pictures."""
        height, width = self.cache.latents.shape[-2:]
        return height * DOWNSCALE, width * DOWNSCALE


@dataclass(frozen=True)
class Choice:
    """Which pictures are drawn, and how often.

    Attributes:
        limit: only the first so many core concepts; None takes all.
        only: only concepts with these labels; None takes all.
        favoured: labels with a share of their own; None takes the everyday ones.
        share: their share of the draws, 0–1; None draws every picture alike.
    """

    limit: int | None = None
    only: frozenset[str] | None = None
    favoured: frozenset[str] | None = None
    share: float | None = None


def load_buckets(folder: Path, art: ArtSet, *, batch: int, choice: Choice) -> list[Bucket]:
    """One bucket per picture size; `batch` counts native pictures, smaller ones come in larger batches.

    Raises:
        FileNotFoundError: nothing is cached.
    """
    by_size: dict[str, list[LatentCache]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        by_size.setdefault(file.stem.rpartition("-")[0], []).append(load_cache(file))
    if not by_size:
        raise FileNotFoundError(f"{folder} has no latents; run: python -m training.latents")
    allowed = set(art.pick(limit=choice.limit, labels=choice.only))
    buckets = []
    for caches in by_size.values():
        kept = [[row for row, item in enumerate(cache.items) if item in allowed] for cache in caches]
        merged = LatentCache(
            torch.cat([cache.latents[rows] for cache, rows in zip(caches, kept, strict=True)]),
            [cache.items[row] for cache, rows in zip(caches, kept, strict=True) for row in rows],
            [cache.colours[row] for cache, rows in zip(caches, kept, strict=True) for row in rows],
        )
        cells = merged.latents.shape[-2] * merged.latents.shape[-1]
        curriculum = Curriculum(art, merged.items, everyday_share=choice.share, labels=choice.favoured)
        buckets.append(Bucket(merged, curriculum, max(4, min(2 * batch, batch * 256 // cells))))
    return buckets


def bucket_weights(buckets: list[Bucket], small_share: float) -> list[float]:
    """Probability of each bucket: `small_share` for pictures under 128 px, the square ones most of the rest.

    Raises:
        ValueError: only sizes are cached that the share leaves out.
    """
    raw = []
    for bucket in buckets:
        height, width = bucket.size_px
        large = (1 - small_share) * (0.8 if height == width else 0.05)
        raw.append(small_share if max(height, width) < NATIVE_PX else large)
    if not any(raw):
        sizes = [bucket.size_px for bucket in buckets]
        raise ValueError(f"small share {small_share} leaves nothing to train on: the cached sizes are {sizes}")
    return [weight / sum(raw) for weight in raw]


@dataclass(frozen=True)
class TextPlan:
    """How the texts of one step are encoded; the same in all processes, so that steps cost the same.

    Attributes:
        length: tokens per chunk.
        extra_chunks: neutral texts put behind every caption.
        gradient: whether the towers learn from this step.
    """

    length: int
    extra_chunks: int
    gradient: bool


def draw_text_plan(rng: random.Random, *, long_share: float, learning_share: float = 1.0) -> TextPlan:
    """Mostly one short chunk; `long_share` of the steps have the engine's full 77 tokens, half of those more chunks.

    Args:
        learning_share: share of the steps, 0–1, in which the towers learn; steps with 77 tokens stay below 0.3.
    """
    learns = rng.random() < learning_share
    if rng.random() < long_share:
        chunks = rng.choice((0, 0, 1, 1, 2))
        return TextPlan(CHUNK, chunks, gradient=learns and chunks == 0 and rng.random() < 0.3)
    if rng.random() < 0.15:
        return TextPlan(SHORT, 1, gradient=learns)
    return TextPlan(rng.choice((SHORT, SHORT, MEDIUM)), 0, gradient=learns)


class NoiseTrainer:
    """Draws pictures and captions, and gives the loss of one step.

    Args:
        network: {"unet", "text"}.
        shared: generator that gives the same numbers in every process.
        own: generator of this process.
        suffix: words behind every caption that is not empty.
    """

    def __init__(
        self, network: nn.ModuleDict, art: ArtSet, *, shared: random.Random, own: random.Random, suffix: str = ""
    ) -> None:
        self._unet, self._text, self._art, self._suffix = network["unet"], network["text"], art, suffix
        self.shared, self._own = shared, own
        self._noising = min_snr_noising()

    def loss(self, bucket: Bucket, plan: TextPlan) -> Tensor:
        """Weighted squared error of the predicted noise, over one batch of the bucket."""
        rows = bucket.curriculum.draw(bucket.batch, rng=self._own)
        latents = bucket.cache.latents[rows].float()
        encoding = self._encode([self._caption(bucket, row, plan) for row in rows], plan)
        timesteps = torch.multinomial(self._noising.probabilities, len(rows), replacement=True)
        noise = torch.randn_like(latents)
        signal = self._noising.signal[timesteps].view(-1, 1, 1, 1)
        noisy = (signal.sqrt() * latents + (1 - signal).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        conditions = {"text_embeds": encoding.pooled, "time_ids": self._time_ids(*bucket.size_px, len(rows))}
        noisy = noisy.to(encoding.hidden.dtype)
        predicted = self._unet(noisy, timesteps, encoding.hidden, added_cond_kwargs=conditions).sample.float()
        errors = (predicted - noise).square().mean((1, 2, 3))
        return (errors * self._noising.weights[timesteps]).mean()

    def _caption(self, bucket: Bucket, row: int, plan: TextPlan) -> str:
        if self._own.random() < EMPTY_SHARE:
            negative = self._own.sample(NEGATIVE_WORDS, self._own.randint(2, 8))
            return ", ".join(negative) if self._own.random() < 0.3 else ""
        concept, style = self._art.items[bucket.cache.items[row]]
        filler = 0.3 if plan.length > SHORT else 0.0
        text = caption(self._art.concepts[concept], style, bucket.cache.colours[row], rng=self._own, filler=filler)
        return f"{text}, {self._suffix}" if self._suffix else text

    def _encode(self, texts: list[str], plan: TextPlan) -> Encoding:
        with torch.set_grad_enabled(plan.gradient):
            encodings = [self._text(texts, plan.length)]
            for _ in range(plan.extra_chunks):  # the same words behind all captions: one text to encode
                extra = self._text([filler_words(self._own)], plan.length)
                shape = (len(texts), -1, -1)
                encodings.append(Encoding(extra.hidden.expand(shape), extra.pooled.expand(shape[:2])))
            return joined(encodings)

    def _time_ids(self, height: int, width: int, count: int) -> Tensor:
        rows = []
        for _ in range(count):
            draw = self._own.random()
            if draw < 0.6:
                rows.append(consistent_time_ids(height, width))
            else:
                scale = 1.5 if draw < 0.8 else 0.8 if draw < 0.85 else self._own.uniform(0.6, 2.0)
                rows.append(scaled_time_ids(height, width, scale))
        return torch.tensor(rows)


def build_network(tables: Path, vocabulary: Path, *, seed: int) -> nn.ModuleDict:
    """Fresh UNet and text towers."""
    torch.manual_seed(seed)
    text = PromptEncoder(new_text_towers(load_token_tables(tables)), vocabulary)
    return nn.ModuleDict({"unet": new_unet(), "text": text})


def start_towers(network: nn.ModuleDict, checkpoint: Path) -> None:
    """Give the towers the weights that the text stage prepared."""
    prepared = {
        name.removeprefix("text."): weight
        for name, weight in averaged_weights(checkpoint).items()
        if name.startswith("text.")
    }
    missing = network["text"].load_state_dict(prepared, strict=False).missing_keys
    if any("token_embedding" not in name and "position_ids" not in name for name in missing):
        raise ValueError(f"{checkpoint} lacks {missing}")


def train(arguments: argparse.Namespace) -> None:
    """One process of the stage."""
    state = StateFolder(arguments.state)
    art = load_art(state.file("art"))
    network = build_network(arguments.tables, arguments.vocabulary, seed=arguments.seed)
    if arguments.towers is not None:
        start_towers(network, arguments.towers)
    prepare(network, chosen_dtype(arguments.precision))
    run = Run(state.file("runs", arguments.run), network, minutes=arguments.minutes)
    if arguments.resume:
        run.load(arguments.start_from)
    run.stop_on_signals()
    schedule = Schedule(peak=arguments.rate, warmup=arguments.warmup)
    until = arguments.samples
    if arguments.finish is not None:
        until = run.samples + arguments.finish if until is None else until
        schedule = replace(schedule, decay_from=until - arguments.finish, decay_to=until)
    only, favoured = (read_labels(file) if file else None for file in (arguments.only, arguments.favour))
    choice = Choice(limit=arguments.concepts, only=only, favoured=favoured, share=arguments.everyday)
    buckets = load_buckets(state.file("latents"), art, batch=arguments.batch, choice=choice)
    weights = bucket_weights(buckets, arguments.small)
    shared = random.Random(f"{arguments.seed}:{run.samples}")
    trainer = NoiseTrainer(network, art, shared=shared, own=seeded(arguments.seed, "unet", run.samples))
    losses: list[float] = []
    while run.going(until):
        bucket = shared.choices(buckets, weights)[0]
        plan = draw_text_plan(shared, long_share=arguments.long, learning_share=arguments.text)
        loss = trainer.loss(bucket, plan)
        loss.backward()
        rate = schedule.rate(run.samples)
        norm = run.finish_step(bucket.batch * world_size(), rate)
        losses.append(float(loss.detach()))
        if rank() == 0 and run.steps % 10 == 0:
            mean = sum(losses) / len(losses)
            logger.info(
                "%d samples, step %d: loss %.4f, norm %.2f, rate %.1e", run.samples, run.steps, mean, norm, rate
            )
            losses.clear()
    run.save()


def main() -> None:
    """Train, or with --finish N let the learning rate fall to zero over the next N samples."""
    start_logging()
    parser = stage_parser(__doc__)
    parser.add_argument("--tables", type=Path, required=True, help="checkpoint that holds the frozen token tables")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder with vocab.json and merges.txt")
    parser.add_argument("--towers", type=Path, default=None, help="checkpoint of the text stage to start from")
    parser.add_argument("--run", default="unet", help="name of the run's folder")
    parser.add_argument("--start-from", type=Path, default=None, help="with --resume: another run's checkpoint")
    parser.add_argument("--samples", type=int, default=None, help="stop at this sample count")
    parser.add_argument("--finish", type=int, default=None, metavar="N", help="decay to zero over N samples, then stop")
    parser.add_argument("--batch", type=int, default=32, help="128 px pictures per process and step")
    parser.add_argument("--rate", type=float, default=8e-4, help="AdamW's learning rate; Muon's is twice that")
    parser.add_argument("--warmup", type=int, default=4000, help="samples over which the rate rises")
    parser.add_argument("--small", type=float, default=0.0, help="share of steps on 64 px pictures, 0-1")
    parser.add_argument("--everyday", type=float, default=None, help="share of everyday concepts, 0-1; default: even")
    parser.add_argument("--favour", type=Path, default=None, help="file of labels that count as everyday concepts")
    parser.add_argument("--long", type=float, default=0.25, help="share of steps with 77 tokens per chunk, 0-1")
    parser.add_argument("--text", type=float, default=1.0, help="share of steps in which the text towers learn, 0-1")
    add_precision_option(parser)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    in_processes(arguments.processes, train, arguments)


if __name__ == "__main__":
    main()
