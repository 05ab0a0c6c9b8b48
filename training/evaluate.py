"""Scores a checkpoint with the judge: concepts, styles, background colours, unseen words, two objects.

Run: `python -m training.evaluate --weights models/embedded/focale-tiny.safetensors --per-concept 4`.
"""

import argparse
import json
import logging
import random
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing import get_context

from training.art import TRAINING_STYLES, ArtSet, load_recognition_art
from training.curriculum import everyday_labels
from training.generate import Family, contact_sheet, draw, load_family
from training.judge import Judge, Verdict, concept_order, load_judge, report
from training.nets import NATIVE_PX
from training.pictures import COLOURS
from training.precision import add_precision_option, chosen_dtype
from training.stages import StateFolder, stage_parser, start_logging

logger = logging.getLogger(__name__)

BATCH = 16
PER_COLOUR = 8
PRESET = Path(__file__).parents[1] / "presets" / "focale.json"
VOCABULARY = Path(__file__).parents[1] / "models" / "tokenizer"
# Words in no label and no tag, with the concepts that count as right.
UNSEEN_WORDS: dict[str, tuple[str, ...]] = {
    "cheeseburger": ("hamburger",),
    "canine": ("dog face", "dog", "fox", "wolf"),
    "missile": ("rocket",),
    "cottage": ("house", "house with garden", "hut"),
    "sedan": ("automobile", "oncoming automobile"),
    "parasol": ("umbrella", "umbrella on ground", "umbrella with rain drops"),
    "daisy": ("blossom", "sunflower", "white flower"),
    "feline": ("cat", "cat face", "black cat"),
    "jetliner": ("airplane", "small airplane"),
    "blaze": ("fire",),
}
PAIRS = (("red apple", "cat face"), ("rocket", "full moon"), ("dog face", "soccer ball"), ("pizza", "red heart"))


@dataclass(frozen=True)
class Scores:
    """Shares of pictures, 0–1; NaN where nothing was drawn for it."""

    top1: float
    top5: float
    everyday_top1: float
    everyday_top5: float
    styles_told_apart: float
    background: float
    unseen_top5: float
    pairs_both_in_top5: float


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn for all measures.

    Attributes:
        weights, vocabulary: checkpoint, and folder with vocab.json and merges.txt.
        lora: file merged into the UNet.
        steps, guidance_scale: Euler steps; guidance 1 draws without the empty prompt.
        dtype: of the UNet.
        width, height: in pixels; of oblong pictures the judge sees the square in the middle.
    """

    weights: Path
    vocabulary: Path
    lora: Path | None
    steps: int
    guidance_scale: float
    dtype: torch.dtype
    width: int = NATIVE_PX
    height: int = NATIVE_PX


@cache
def _family(drawing: Drawing) -> Family:
    return load_family(drawing.weights, drawing.vocabulary, lora=drawing.lora, dtype=drawing.dtype)


def _draw_part(job: tuple[Drawing, Sequence[str], Sequence[int]]) -> Tensor:
    """One batch, in a process of one thread that keeps the networks."""
    drawing, prompts, seeds = job
    torch.set_num_threads(1)
    return draw(
        _family(drawing),
        prompts,
        seeds,
        steps=drawing.steps,
        guidance_scale=drawing.guidance_scale,
        height=drawing.height,
        width=drawing.width,
    )


class Painter:
    """Draws batches in several processes of one thread each; with one process, in this one."""

    def __init__(self, drawing: Drawing, *, processes: int) -> None:
        self._drawing = drawing
        self._pool = get_context("spawn").Pool(processes) if processes > 1 else None

    def pictures(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """(B, 3, height, width) pixels in −1…1, one per prompt and seed."""
        jobs = [
            (self._drawing, prompts[start : start + BATCH], seeds[start : start + BATCH])
            for start in range(0, len(prompts), BATCH)
        ]
        parts: Iterable[Tensor] = map(_draw_part, jobs) if self._pool is None else self._pool.imap(_draw_part, jobs)
        drawn: list[Tensor] = []
        for part in parts:
            drawn.append(part.clone())  # frees what the process shares
            if len(drawn) % 20 == 0:
                logger.info("%d of %d pictures", BATCH * len(drawn), len(prompts))
        return torch.cat(drawn)

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()


def middle_square(pixels: Tensor) -> Tensor:
    """(B, 3, 128, 128) pixels: the largest square in the middle of (B, 3, H, W) pixels in −1…1, at the judge's size."""
    height, width = pixels.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[..., top : top + side, left : left + side]
    if side == NATIVE_PX:
        return square
    return F.interpolate(square, size=(NATIVE_PX, NATIVE_PX), mode="bicubic", antialias=True).clamp(-1, 1)


def nearest_colour(pixels: Tensor) -> list[str]:
    """Name of the background of each picture: the colour nearest to the median of its border, or "white"."""
    border = torch.cat([pixels[:, :, :6].flatten(2), pixels[:, :, -6:].flatten(2), pixels[..., :6].flatten(2)], dim=-1)
    medians = (border.median(-1).values + 1) * 127.5
    names = ["white", *COLOURS]
    palette = torch.tensor([(255, 255, 255), *COLOURS.values()], dtype=torch.float32)
    return [names[int(i)] for i in torch.cdist(medians, palette).argmin(1)]


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else float("nan")


def evaluate(
    painter: Painter, judge: Judge, art: ArtSet, *, per_concept: int, limit: int | None, seed: int = 0
) -> tuple[Scores, dict[str, Tensor]]:
    """Scores and the pictures behind them, by measure.

    Args:
        per_concept: pictures of each concept; picture k has seed k and style k modulo 3.
        limit: a seeded sample of this many core concepts; None takes all.
    """
    order = concept_order(art, judge.concepts.out_features)
    rng = random.Random(seed)
    chosen = order if limit is None else sorted(rng.sample(order, min(limit, len(order))))
    rows = [(concept, number) for concept in chosen for number in range(per_concept)]
    styles = [TRAINING_STYLES[number % len(TRAINING_STYLES)] for _, number in rows]
    prompts = [f"{art.concepts[c].label}, {style} style" for (c, _), style in zip(rows, styles, strict=True)]
    pixels = painter.pictures(prompts, [number for _, number in rows])
    place = {concept: position for position, concept in enumerate(order)}
    wanted = torch.tensor([place[concept] for concept, _ in rows])
    with torch.inference_mode():
        parts = [judge(middle_square(part)) for part in pixels.split(64)]
    verdict = Verdict(*(torch.cat([getattr(part, name) for part in parts]) for name in ("concepts", "styles")))
    hits = verdict.concepts.topk(min(5, len(order))).indices == wanted[:, None]
    first, five = hits[:, 0].tolist(), hits.any(1).tolist()
    everyday = [art.concepts[concept].label in everyday_labels() for concept, _ in rows]
    told = [TRAINING_STYLES[int(i)] == style for i, style in zip(verdict.styles.argmax(1), styles, strict=True)]
    colours, on_colours = _colour_pictures(painter, art, chosen, rng)
    unseen, right = _unseen_pictures(painter, judge, art, order)
    pairs, both = _pair_pictures(painter, judge, art, order)
    scores = Scores(
        top1=_share(first),
        top5=_share(five),
        everyday_top1=_share([hit for hit, known in zip(first, everyday, strict=True) if known]),
        everyday_top5=_share([hit for hit, known in zip(five, everyday, strict=True) if known]),
        styles_told_apart=_share(told),
        background=_share(on_colours),
        unseen_top5=_share(right),
        pairs_both_in_top5=_share(both),
    )
    return scores, {"concepts": pixels, "backgrounds": colours, "unseen": unseen, "pairs": pairs}


def _colour_pictures(
    painter: Painter, art: ArtSet, concepts: Sequence[int], rng: random.Random
) -> tuple[Tensor, list[bool]]:
    names = list(COLOURS) * PER_COLOUR
    prompts = [f"{art.concepts[rng.choice(concepts)].label}, {name} background" for name in names]
    pixels = painter.pictures(prompts, list(range(len(names))))
    return pixels, [seen == name for seen, name in zip(nearest_colour(pixels), names, strict=True)]


def _labels_seen(judge: Judge, art: ArtSet, order: Sequence[int], pixels: Tensor) -> list[set[str]]:
    with torch.inference_mode():
        best = judge(middle_square(pixels)).concepts.topk(min(5, len(order))).indices
    return [{art.concepts[order[int(i)]].label for i in row} for row in best]


def _unseen_pictures(painter: Painter, judge: Judge, art: ArtSet, order: Sequence[int]) -> tuple[Tensor, list[bool]]:
    pixels = painter.pictures([f"a {word}" for word in UNSEEN_WORDS], [0] * len(UNSEEN_WORDS))
    seen = _labels_seen(judge, art, order, pixels)
    return pixels, [bool(labels & set(right)) for labels, right in zip(seen, UNSEEN_WORDS.values(), strict=True)]


def _pair_pictures(painter: Painter, judge: Judge, art: ArtSet, order: Sequence[int]) -> tuple[Tensor, list[bool]]:
    pixels = painter.pictures([f"a {one} next to a {other}" for one, other in PAIRS], [0] * len(PAIRS))
    return pixels, [
        set(pair) <= labels for labels, pair in zip(_labels_seen(judge, art, order, pixels), PAIRS, strict=True)
    ]


def preset_guidance() -> float:
    """The guidance scale that the page sends with the model's own preset."""
    return float(json.loads(PRESET.read_text(encoding="utf-8"))["default_cfg_scale"])


def main() -> None:
    """Log the table; write the contact sheets and scores.json."""
    start_logging()
    torch.set_num_threads(1)
    parser = stage_parser(__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint to score")
    parser.add_argument("--vocabulary", type=Path, default=VOCABULARY, help="folder with vocab.json and merges.txt")
    parser.add_argument("--lora", type=Path, default=None, help="LoRA file to draw with")
    parser.add_argument("--per-concept", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance-scale", type=float, default=preset_guidance(), help="default: the preset's")
    parser.add_argument("--width", type=int, default=NATIVE_PX, help="in pixels, a multiple of 16")
    parser.add_argument("--height", type=int, default=NATIVE_PX, help="in pixels, a multiple of 16")
    parser.add_argument("--processes", type=int, default=2)
    add_precision_option(parser)
    parser.add_argument("--output", type=Path, default=None, help="folder for the sheets; default: evaluation/NAME")
    run(parser.parse_args())


def run(arguments: argparse.Namespace) -> Scores:
    """Evaluate as the command line says."""
    state = StateFolder(arguments.state)
    art = load_recognition_art(state)
    judge = load_judge(state.file("judge.safetensors"))
    report(judge, art)
    drawing = Drawing(
        arguments.weights,
        arguments.vocabulary,
        arguments.lora,
        arguments.steps,
        arguments.guidance_scale,
        chosen_dtype(arguments.precision),
        arguments.width,
        arguments.height,
    )
    with closing(Painter(drawing, processes=arguments.processes)) as painter:
        scores, pictures = evaluate(
            painter, judge, art, per_concept=arguments.per_concept, limit=arguments.concepts, seed=arguments.seed
        )
    folder: Path = arguments.output or state.file("evaluation", arguments.weights.stem)
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in pictures.items():
        contact_sheet(pixels[:256], columns=16).save(folder / f"{name}.png")
    (folder / "scores.json").write_text(json.dumps(asdict(scores), indent=1), encoding="utf-8")
    for name, value in asdict(scores).items():
        logger.info("%-20s %.1f %%", name, 100 * value)
    return scores


if __name__ == "__main__":
    main()
