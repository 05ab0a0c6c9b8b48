"""A small classifier of ours, trained on real art only, that says what a picture shows and in which style.

It knows nothing of the generator. Its own accuracy is measured on pictures it never saw: new placements and
backgrounds of the training styles, and a style that was left out altogether.
"""

import argparse
import logging
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from training.art import HELD_OUT_STYLE, JUDGE_STYLES, TRAINING_STYLES, ArtSet, Style, load_recognition_art
from training.optim import Schedule
from training.pictures import Placement, compose, random_colour
from training.precision import add_precision_option, chosen_dtype, prepare
from training.runs import Run, averaged_weights, in_processes, seeded
from training.stages import StateFolder, stage_parser, start_logging

logger = logging.getLogger(__name__)

SIDE_PX = 64
WIDTHS = (32, 64, 128, 256)
NO_STYLE = -100
PLACEMENT = Placement(scale=(0.75, 1.0), shift=0.06, rotation=0.1)


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in a batch of pictures.

    Attributes:
        concepts: (B, core concepts) scores, in the order of `concept_order`.
        styles: (B, 3) scores, in the order of TRAINING_STYLES.
    """

    concepts: Tensor
    styles: Tensor


class Judge(nn.Module):
    """A plain convolutional network: 64 px pictures to scores of concepts and styles, about 1 M parameters."""

    def __init__(self, concepts: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in WIDTHS:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU()]
            layers += [nn.Conv2d(width, width, 3, padding=1, stride=2), nn.GroupNorm(8, width), nn.GELU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.concepts = nn.Linear(channels * 16, concepts)
        self.styles = nn.Linear(channels * 16, len(TRAINING_STYLES))
        self.dropout = nn.Dropout(0.3)

    def forward(self, pixels: Tensor) -> Verdict:
        """Judge (B, 3, height, width) pixels in −1…1 of any size."""
        small = F.interpolate(pixels, size=(SIDE_PX, SIDE_PX), mode="area").contiguous(
            memory_format=torch.channels_last
        )
        flat = self.dropout(self.features(small.to(self.styles.weight.dtype)).flatten(1))
        return Verdict(self.concepts(flat).float(), self.styles(flat).float())


def concept_order(art: ArtSet, limit: int | None = None) -> list[int]:
    """Indices of the core concepts, in the order of the judge's scores."""
    return [index for index, concept in enumerate(art.concepts) if concept.core][:limit]


def generator_damage(pixels: Tensor, rng: random.Random) -> Tensor:
    """Blur, noise and colour changes, so that the judge looks at shapes and forgives a generator's softness."""
    if rng.random() < 0.5:
        factor = rng.choice((2, 3, 4))
        small = F.avg_pool2d(pixels, factor)
        pixels = F.interpolate(small, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
    gain = 1 + 0.2 * (torch.rand(len(pixels), 3, 1, 1) - 0.5)
    noise = 0.1 * rng.random() * torch.randn_like(pixels)
    return (pixels * gain + noise).clamp(-1, 1)


def style_target(style: Style) -> int:
    """Place of a style the generator knows; NO_STYLE for the others."""
    return TRAINING_STYLES.index(style) if style in TRAINING_STYLES else NO_STYLE


def train(arguments: argparse.Namespace) -> None:
    """Train the judge, and log its accuracy on pictures it has not seen."""
    state = StateFolder(arguments.state)
    art = load_recognition_art(state)
    order = concept_order(art, arguments.concepts)
    torch.manual_seed(arguments.seed)
    judge = Judge(len(order)).to(memory_format=torch.channels_last)
    prepare(judge, chosen_dtype(arguments.precision))
    run = Run(state.file("runs", "judge"), judge, minutes=arguments.minutes, muon_ratio=None)
    if arguments.resume:
        run.load()
    run.stop_on_signals()
    rng = seeded(arguments.seed, "judge", run.samples)
    schedule = Schedule(arguments.rate, warmup=3000, decay_from=arguments.samples // 3, decay_to=arguments.samples)
    position = {concept: place for place, concept in enumerate(order)}
    pictures = art.pick(styles=JUDGE_STYLES, limit=arguments.concepts)
    while run.going(arguments.samples):
        chosen = rng.choices(pictures, k=arguments.batch)
        colours = [random_colour(rng) for _ in chosen]
        pixels = compose(art, chosen, colours, rng=rng, height=SIDE_PX, width=SIDE_PX, placement=PLACEMENT)
        verdict = judge(generator_damage(pixels, rng))
        concepts = torch.tensor([position[art.items[i][0]] for i in chosen])
        styles = torch.tensor([style_target(art.items[i][1]) for i in chosen])
        loss = F.cross_entropy(verdict.concepts, concepts, label_smoothing=0.05)
        loss = loss + F.cross_entropy(verdict.styles, styles, ignore_index=NO_STYLE)
        loss.backward()
        run.finish_step(len(chosen), schedule.rate(run.samples))
        if run.steps % 50 == 0:
            logger.info("%d samples: loss %.3f", run.samples, float(loss.detach()))
    run.save()
    weights = {name: weight.contiguous() for name, weight in averaged_weights(run.file).items()}
    save_file(weights, state.file("judge.safetensors"), metadata={"concepts": str(len(order))})
    report(load_judge(state.file("judge.safetensors")), art)


def load_judge(file: Path) -> Judge:
    """The trained judge, in evaluation mode.

    Raises:
        FileNotFoundError: `python -m training.judge` has not run for this state folder.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; run: python -m training.judge")
    weights = load_file(file)
    judge = Judge(len(weights["concepts.bias"]))
    judge.load_state_dict(weights)
    return judge.eval()


@torch.inference_mode()
def accuracy(judge: Judge, art: ArtSet, *, style: Style, count: int = 400, seed: int = 12345) -> tuple[float, float]:
    """Top-1 and top-5 share, 0–1, on freshly placed real pictures of one style."""
    order = concept_order(art, judge.concepts.out_features)
    rng = random.Random(seed)
    pictures = art.pick(styles=(style,), limit=len(order))
    pictures = rng.sample(pictures, min(count, len(pictures)))
    pixels = compose(art, pictures, [random_colour(rng) for _ in pictures], rng=rng, placement=PLACEMENT)
    best = torch.cat([judge(part).concepts for part in pixels.split(64)]).topk(min(5, len(order))).indices
    hits = best == torch.tensor([order.index(art.items[i][0]) for i in pictures])[:, None]
    return float(hits[:, 0].float().mean()), float(hits.any(1).float().mean())


def report(judge: Judge, art: ArtSet) -> None:
    """Log the judge's own accuracy on every style."""
    for style in (*TRAINING_STYLES, HELD_OUT_STYLE):
        first, five = accuracy(judge, art, style=style)
        note = "style never seen" if style == HELD_OUT_STYLE else "placements never seen"
        logger.info("judge, %s (%s): top-1 %.1f %%, top-5 %.1f %%", style, note, 100 * first, 100 * five)


def main() -> None:
    """Train and measure the judge."""
    start_logging()
    parser = stage_parser(__doc__)
    parser.add_argument("--samples", type=int, default=240_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    add_precision_option(parser)
    in_processes(1, train, parser.parse_args())


if __name__ == "__main__":
    main()
