"""Trains the image tower against the finished, frozen text tower, and stores the bank that describing looks up.

Contrastive loss: Radford et al. 2021 (arXiv:2103.00020), fig. 3; the same picture's other captions in a batch do not
count as wrong. Besides, every picture is to find its label among all labels of the bank.
"""

import argparse
import copy
import json
import logging
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from training.art import HELD_OUT_STYLE, RECOGNITION_STYLES, TRAINING_STYLES, ArtSet, Style, load_recognition_art
from training.captions import caption, with_article
from training.checkpoints import read_network
from training.judge import generator_damage
from training.nets import NATIVE_PX, TEXT_WIDTHS
from training.optim import Schedule
from training.pictures import AUGMENTED, CENTRED, compose, random_colour
from training.precision import add_precision_option, chosen_dtype, prepare
from training.prompts import PromptEncoder
from training.runs import Run, averaged_weights, in_processes, seeded
from training.stages import StateFolder, stage_parser, start_logging

logger = logging.getLogger(__name__)

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own normalisation
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
TOKENS = 32
GALLERY = 512


def new_vision_tower() -> CLIPVisionModelWithProjection:
    """An image tower of the family with fresh weights: 128 px in patches of 16, 2.4 M parameters."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=768,
            projection_dim=TEXT_WIDTHS[1],
            num_hidden_layers=5,
            num_attention_heads=6,
            image_size=NATIVE_PX,
            patch_size=16,
            hidden_act="gelu",
            attn_implementation="eager",  # as in the text towers: the fused backward pass is slow on CPUs
        )
    )


def image_embeds(tower: CLIPVisionModelWithProjection, pixels: Tensor) -> Tensor:
    """(B, 192) float32 embeddings of unit length, from (B, 3, h, w) pixels in −1…1 of any size."""
    if pixels.shape[-2:] != (NATIVE_PX, NATIVE_PX):
        pixels = F.interpolate(pixels, size=(NATIVE_PX, NATIVE_PX), mode="area")
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    values = (((pixels + 1) / 2 - mean) / deviation).to(tower.dtype)
    return F.normalize(tower(pixel_values=values).image_embeds.float(), dim=-1)


@torch.no_grad()
def text_embeds(encoder: PromptEncoder, texts: list[str]) -> Tensor:
    """(B, 192) embeddings of unit length."""
    parts = [
        encoder.second(encoder.token_ids(texts[i : i + 64], TOKENS)[1]).text_embeds for i in range(0, len(texts), 64)
    ]
    return F.normalize(torch.cat(parts).float(), dim=-1)


def disturbed(pixels: Tensor, rng: random.Random) -> Tensor:
    """Pictures as they might also look: softer, in other colours, some in grey, some with a corner hidden."""
    pixels = generator_damage(pixels, rng)
    mixing = torch.eye(3) + 0.12 * torch.randn(len(pixels), 3, 3)
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
    """The image tower and the temperature that is learnt beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = new_vision_tower()
        self.log_scale = nn.Parameter(torch.tensor(math.log(14.0)))

    def scale(self) -> Tensor:
        """Factor of the cosines, at most 100."""
        return self.log_scale.float().exp().clamp(max=100)


@torch.inference_mode()
def retrieval(tower: CLIPVisionModelWithProjection, encoder: PromptEncoder, art: ArtSet, *, seed: int = 5) -> float:
    """Share of pictures, 0–1, whose own caption is among the five nearest of 512 different ones."""
    rng = random.Random(seed)
    pictures = art.pick()
    pictures = rng.sample(pictures, min(GALLERY, len(pictures)))
    names = [(art.concepts[art.items[i][0]].label, art.items[i][1]) for i in pictures]
    texts = text_embeds(encoder, [f"{label}, {style} style" for label, style in names])
    images = _embed(tower, art, pictures, rng)
    best = (images @ texts.T).topk(min(5, len(pictures))).indices
    return float((best == torch.arange(len(pictures))[:, None]).any(1).float().mean())


def _embed(tower: CLIPVisionModelWithProjection, art: ArtSet, pictures: list[int], rng: random.Random) -> Tensor:
    parts = []
    for start in range(0, len(pictures), 64):
        chosen = pictures[start : start + 64]
        pixels = compose(art, chosen, [random_colour(rng) for _ in chosen], rng=rng, placement=CENTRED)
        parts.append(image_embeds(tower, pixels))
    return torch.cat(parts)


def describe_bank(encoder: PromptEncoder, art: ArtSet) -> tuple[Tensor, list[str]]:
    """(core concepts, 192) embeddings of unit length, each the mean over plain captions, and their labels."""
    labels = [concept.label for concept in art.concepts if concept.core]
    frames = [f"{{}}, {style} style" for style in TRAINING_STYLES] + ["{}"]
    rows = [text_embeds(encoder, [frame.format(with_article(label)) for label in labels]) for frame in frames]
    return F.normalize(torch.stack(rows).mean(0), dim=-1), labels


def save_bank(bank: Tensor, labels: list[str], file: Path) -> None:
    """Write the bank, float16, its labels in the header as a JSON list."""
    save_file({"embeddings": bank.half().contiguous()}, file, metadata={"labels": json.dumps(labels)})


def load_bank(file: Path) -> tuple[Tensor, list[str]]:
    """The bank that `save_bank` wrote, float32."""
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor("embeddings").float(), json.loads(tensors.metadata()["labels"])


@torch.inference_mode()
def describing(
    tower: CLIPVisionModelWithProjection,
    bank: Tensor,
    labels: list[str],
    art: ArtSet,
    style: Style,
    *,
    count: int = 400,
) -> float:
    """Share of real pictures of one style, 0–1, whose label is among the bank's five nearest."""
    rng = random.Random(7)
    pictures = art.pick(styles=(style,))
    pictures = rng.sample(pictures, min(count, len(pictures)))
    best = (_embed(tower, art, pictures, rng) @ bank.T).topk(min(5, len(labels))).indices
    named = [{labels[int(i)] for i in row} for row in best]
    return sum(art.concepts[art.items[i][0]].label in seen for i, seen in zip(pictures, named, strict=True)) / len(
        named
    )


def train(arguments: argparse.Namespace) -> None:
    """One process of the stage."""
    state = StateFolder(arguments.state)
    art = load_recognition_art(state)
    encoder = read_network(arguments.weights, arguments.vocabulary)["text"].requires_grad_(False).eval()
    assert isinstance(encoder, PromptEncoder)
    bank, labels = describe_bank(encoder, art)
    places = {label: place for place, label in enumerate(labels)}
    torch.manual_seed(arguments.seed)
    trained, reader, dtype = Trained(), copy.deepcopy(encoder), chosen_dtype(arguments.precision)
    for network in (trained, reader):
        prepare(network, dtype)
    run = Run(state.file("runs", "vision"), trained, minutes=arguments.minutes, muon_ratio=None)
    if arguments.resume:
        run.load()
    run.stop_on_signals()
    schedule = Schedule(arguments.rate, warmup=8000, decay_from=arguments.samples // 3, decay_to=arguments.samples)
    rng = seeded(arguments.seed, "vision", run.samples)
    pictures = art.pick(styles=RECOGNITION_STYLES, limit=arguments.concepts)
    while run.going(arguments.samples):
        chosen = rng.choices(pictures, k=arguments.batch)
        colours = [random_colour(rng) for _ in chosen]
        pixels = compose(art, chosen, colours, rng=rng, placement=AUGMENTED)
        named = [(art.concepts[art.items[i][0]], art.items[i][1]) for i in chosen]
        texts = [
            caption(concept, style, colour, rng=rng) for (concept, style), colour in zip(named, colours, strict=True)
        ]
        images = image_embeds(trained.tower, disturbed(pixels, rng))
        loss = contrastive_loss(images, text_embeds(reader, texts), trained.scale(), torch.tensor(chosen))
        targets = torch.tensor([places[concept.label] for concept, _ in named])
        loss = loss + F.cross_entropy(trained.scale() * images @ bank.T, targets, label_smoothing=0.05)
        loss.backward()
        run.finish_step(len(chosen), schedule.rate(run.samples))
        if run.steps % 25 == 0:
            logger.info("%d samples: loss %.3f", run.samples, float(loss.detach()))
    run.save()
    finish(state, art, encoder, run.file)


def finish(state: StateFolder, art: ArtSet, encoder: PromptEncoder, checkpoint: Path) -> None:
    """Store the averaged tower and the bank, and log how well they find real pictures."""
    trained = Trained()
    trained.load_state_dict(averaged_weights(checkpoint), strict=False)
    tower = trained.tower.half().float().eval()
    weights = {name: tensor.half().contiguous() for name, tensor in tower.state_dict().items()}
    save_file(weights, state.file("export", "focale-vision.safetensors"), metadata={"format": "pt"})
    bank, labels = describe_bank(encoder, art)
    save_bank(bank, labels, state.file("export", "focale-describe.safetensors"))
    logger.info("top-5 of %d captions: %.1f %%", GALLERY, 100 * retrieval(tower, encoder, art))
    for style in (*RECOGNITION_STYLES, HELD_OUT_STYLE):
        logger.info("describe, %s: top-5 %.1f %%", style, 100 * describing(tower, bank, labels, art, style))


def main() -> None:
    """Train and measure the image tower."""
    start_logging()
    parser = stage_parser(__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint whose text towers are final")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder with vocab.json and merges.txt")
    parser.add_argument("--samples", type=int, default=300_000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=1e-3)
    add_precision_option(parser)
    in_processes(1, train, parser.parse_args())


if __name__ == "__main__":
    main()
