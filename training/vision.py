"""Trains the image tower against the finished, frozen text tower, and the bank that describing looks up with it.

Contrastive loss: Radford et al. 2021 (arXiv:2103.00020), fig. 3; the same picture's other captions in a batch do not
count as wrong. Besides, every picture is to find its concept among the rows of the bank. These start as the labels'
text embeddings and learn on, since names that sound alike ("camera", "camera with flash") lie too close together.
"""

import argparse
import copy
import logging
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from modules.engine.concepts import BANK_FILE, TOWER_FILE, Bank, ConceptFinder, seen_both_ways
from modules.engine.describe import SURE_OF_CONCEPT
from modules.engine.image_tower import SIDE_PX, image_embeds, new_image_tower
from training.art import HELD_OUT_STYLE, RECOGNITION_STYLES, TRAINING_STYLES, ArtSet, load_recognition_art
from training.captions import caption, with_article
from training.checkpoints import read_network
from training.judge import generator_damage
from training.optim import Schedule, rank, world_size
from training.pictures import AUGMENTED, CENTRED, compose, random_colour
from training.precision import add_precision_option, chosen_dtype, prepare
from training.prompts import PromptEncoder
from training.runs import Run, averaged_weights, in_processes, seeded
from training.stages import StateFolder, stage_parser, start_logging

logger = logging.getLogger(__name__)

TOKENS = 32
GALLERY = 512


@torch.no_grad()
def text_embeds(encoder: PromptEncoder, texts: list[str]) -> Tensor:
    """(B, 192) embeddings of unit length."""
    parts = [
        encoder.second(encoder.token_ids(texts[i : i + 64], TOKENS)[1]).text_embeds for i in range(0, len(texts), 64)
    ]
    return F.normalize(torch.cat(parts).float(), dim=-1)


def bent(pixels: Tensor, amount: float = 0.04) -> Tensor:
    """Pictures bent like rubber, since every hand draws a thing in other proportions.

    Args:
        amount: typical shift, as a share of half the picture.
    """
    shifts = amount * torch.randn(len(pixels), 2, 4, 4)
    shifts = F.interpolate(shifts, size=pixels.shape[-2:], mode="bicubic", align_corners=True)
    still = F.affine_grid(torch.eye(2, 3).expand(len(pixels), 2, 3), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, still + shifts.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)


def disturbed(pixels: Tensor, rng: random.Random) -> Tensor:
    """Pictures as they might also look: bent, softer, in other colours, some in grey, some with a part hidden."""
    pixels = generator_damage(bent(pixels), rng)
    mixing = torch.eye(3) + 0.15 * torch.randn(len(pixels), 3, 3)
    grey = torch.rand(len(pixels), 1, 1) < 0.1
    mixing = torch.where(grey, torch.full((3, 3), 1 / 3), mixing)
    pixels = torch.einsum("bij,bjhw->bihw", mixing, pixels).clamp(-1, 1)
    side = pixels.shape[-1]
    for picture in pixels:
        if rng.random() < 0.3:
            row, column, size = rng.randrange(side), rng.randrange(side), rng.randint(side // 8, side // 3)
            picture[:, row : row + size, column : column + size] = rng.uniform(-1, 1)
    return pixels


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, groups: Tensor) -> Tensor:
    """Cross entropy both ways between (B, 192) embeddings; rows of one group (concept and style) are all right."""
    same = (groups[:, None] == groups[None]).float()
    targets = same / same.sum(1, keepdim=True)
    logits = scale * images @ texts.T
    return 0.5 * (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets))


class Trained(nn.Module):
    """The image tower, and what is learnt beside it: the bank's rows and the temperature.

    Args:
        bank: (concepts, 192) the rows to start from.
    """

    def __init__(self, bank: Tensor) -> None:
        super().__init__()
        self.tower = new_image_tower()
        self.bank_embed = nn.Parameter(bank.clone())
        self.log_scale = nn.Parameter(torch.tensor(math.log(14.0)))

    def bank(self) -> Tensor:
        """(concepts, 192) float32 rows of unit length."""
        return F.normalize(self.bank_embed.float(), dim=-1)

    def scale(self) -> Tensor:
        """Factor of the cosines, at most 100."""
        return self.log_scale.float().exp().clamp(max=100)


@torch.inference_mode()
def retrieval(tower: nn.Module, encoder: PromptEncoder, art: ArtSet, *, seed: int = 5) -> float:
    """Share of pictures, 0–1, whose own caption is among the five nearest of 512 different ones."""
    rng = random.Random(seed)
    pictures = art.pick()
    pictures = rng.sample(pictures, min(GALLERY, len(pictures)))
    names = [(art.concepts[art.items[i][0]].label, art.items[i][1]) for i in pictures]
    texts = text_embeds(encoder, [f"{label}, {style} style" for label, style in names])
    images = _embed(tower, art, pictures, rng)
    best = (images @ texts.T).topk(min(5, len(pictures))).indices
    return float((best == torch.arange(len(pictures))[:, None]).any(1).float().mean())


def _embed(tower: nn.Module, art: ArtSet, pictures: list[int], rng: random.Random) -> Tensor:
    parts = []
    for start in range(0, len(pictures), 64):
        chosen = pictures[start : start + 64]
        colours = [random_colour(rng) for _ in chosen]
        pixels = compose(art, chosen, colours, rng=rng, height=SIDE_PX, width=SIDE_PX, placement=CENTRED)
        parts.append(seen_both_ways(tower, pixels))
    return torch.cat(parts)


def label_bank(encoder: PromptEncoder, art: ArtSet) -> tuple[Tensor, list[str]]:
    """(core concepts, 192) embeddings of unit length, each the mean over plain captions, and their labels."""
    labels = [concept.label for concept in art.concepts if concept.core]
    frames = [f"{{}}, {style} style" for style in TRAINING_STYLES] + ["{}"]
    rows = [text_embeds(encoder, [frame.format(with_article(label)) for label in labels]) for frame in frames]
    return F.normalize(torch.stack(rows).mean(0), dim=-1), labels


@dataclass(frozen=True)
class Naming:
    """How well real pictures are named; shares, 0–1.

    Attributes:
        top5: of pictures whose label is among the five likeliest.
        sure: of pictures whose likeliest label describing would believe.
        sure_and_right: of pictures for which that label is theirs.
    """

    top5: float
    sure: float
    sure_and_right: float


@torch.inference_mode()
def naming(finder: ConceptFinder, art: ArtSet, pictures: list[int]) -> Naming:
    """Place real pictures anew and name them."""
    guesses = finder.bank.guesses(_embed(finder.tower, art, pictures, random.Random(7)))
    labels = [art.concepts[art.items[i][0]].label for i in pictures]
    found = [label in {tag.name for tag in tags} for label, tags in zip(labels, guesses, strict=True)]
    sure = [tags[0].probability >= SURE_OF_CONCEPT for tags in guesses]
    right = [label == tags[0].name for label, tags in zip(labels, guesses, strict=True)]
    both = [one and other for one, other in zip(sure, right, strict=True)]
    return Naming(*(sum(hits) / len(hits) for hits in (found, sure, both)))


def read_inputs(arguments: argparse.Namespace) -> tuple[PromptEncoder, ArtSet]:
    """The frozen text towers, and the art."""
    encoder = read_network(arguments.weights, arguments.vocabulary)["text"].requires_grad_(False).eval()
    assert isinstance(encoder, PromptEncoder)
    return encoder, load_recognition_art(StateFolder(arguments.state))


def train(arguments: argparse.Namespace) -> None:
    """One process of the stage."""
    state = StateFolder(arguments.state)
    encoder, art = read_inputs(arguments)
    bank, labels = label_bank(encoder, art)
    places = {label: place for place, label in enumerate(labels)}
    torch.manual_seed(arguments.seed)
    trained, reader, dtype = Trained(bank), copy.deepcopy(encoder), chosen_dtype(arguments.precision)
    for network in (trained, reader):
        prepare(network, dtype)
    run = Run(state.file("runs", "vision"), trained, minutes=arguments.minutes, muon_ratio=arguments.muon or None)
    if arguments.resume:
        run.load()
    run.stop_on_signals()
    schedule = Schedule(arguments.rate, warmup=8000, decay_from=arguments.samples // 3, decay_to=arguments.samples)
    rng = seeded(arguments.seed, "vision", run.samples)
    pictures = art.pick(styles=RECOGNITION_STYLES, limit=arguments.concepts)
    while run.going(arguments.samples):
        chosen = rng.choices(pictures, k=arguments.batch)
        colours = [random_colour(rng) for _ in chosen]
        pixels = compose(art, chosen, colours, rng=rng, height=SIDE_PX, width=SIDE_PX, placement=AUGMENTED)
        named = [(art.concepts[art.items[i][0]], art.items[i][1]) for i in chosen]
        texts = [
            caption(concept, style, colour, rng=rng) for (concept, style), colour in zip(named, colours, strict=True)
        ]
        images = image_embeds(trained.tower, disturbed(pixels, rng))
        loss = contrastive_loss(images, text_embeds(reader, texts), trained.scale(), torch.tensor(chosen))
        targets = torch.tensor([places[concept.label] for concept, _ in named])
        loss = loss + F.cross_entropy(trained.scale() * images @ trained.bank().T, targets, label_smoothing=0.05)
        loss.backward()
        run.finish_step(len(chosen) * world_size(), schedule.rate(run.samples))
        if run.steps % 25 == 0 and rank() == 0:
            logger.info("%d samples: loss %.3f", run.samples, float(loss.detach()))
    run.save()
    if rank() == 0:
        report(export(state, encoder, art, run.file), encoder, art)


def export(state: StateFolder, encoder: PromptEncoder, art: ArtSet, checkpoint: Path) -> Path:
    """Store the averaged tower and the bank as float16; the folder of both."""
    rows, labels = label_bank(encoder, art)
    trained = Trained(rows)
    trained.load_state_dict(averaged_weights(checkpoint))
    weights = {name: tensor.half().contiguous() for name, tensor in trained.tower.state_dict().items()}
    save_file(weights, state.file("export", TOWER_FILE), metadata={"format": "pt"})
    bank = Bank(trained.bank().detach(), labels, float(trained.scale().detach()))
    bank.save(state.file("export", BANK_FILE))
    return state.file("export")


def report(folder: Path, encoder: PromptEncoder, art: ArtSet) -> None:
    """Log how well the tower and the bank of a folder find real pictures."""
    finder = ConceptFinder(folder)
    logger.info("top-5 of %d captions: %.1f %%", GALLERY, 100 * retrieval(finder.tower, encoder, art))
    for style in (*RECOGNITION_STYLES, HELD_OUT_STYLE):
        note = "style never seen" if style == HELD_OUT_STYLE else "placements never seen"
        log_naming(f"{style} ({note})", naming(finder, art, art.pick(styles=(style,))))
    core = set(art.pick(styles=(HELD_OUT_STYLE,)))
    others = [picture for picture in art.pick(styles=(HELD_OUT_STYLE,), core=False) if picture not in core]
    if others:
        log_naming(f"{HELD_OUT_STYLE}, of which the bank has no label", naming(finder, art, others))


def log_naming(name: str, found: Naming) -> None:
    """Log one row of the report."""
    shares = (100 * found.top5, 100 * found.sure, 100 * found.sure_and_right)
    logger.info("describe, %s: top-5 %.1f %%, sure %.1f %%, sure and right %.1f %%", name, *shares)


def main() -> None:
    """Train and measure the image tower."""
    start_logging()
    parser = stage_parser(__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint whose text towers are final")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder with vocab.json and merges.txt")
    parser.add_argument("--samples", type=int, default=260_000)
    parser.add_argument("--batch", type=int, default=64, help="pictures in each process")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--muon", type=float, default=4.0, help="Muon's learning rate over AdamW's")
    parser.add_argument("--processes", type=int, default=2)
    add_precision_option(parser)
    parser.add_argument("--measure", type=Path, default=None, help="only measure the tower and bank of this folder")
    arguments = parser.parse_args()
    if arguments.measure is not None:
        report(arguments.measure, *read_inputs(arguments))
    else:
        in_processes(arguments.processes, train, arguments)


if __name__ == "__main__":
    main()
