"""Prepares the text towers: they learn to say, from the caption alone, roughly what the picture's latents are.

A few minutes of this spare the UNet the first hours of wading through meaningless text; the towers are then trained
together with the UNet.
"""

import argparse
import logging
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.art import load_art
from training.captions import caption
from training.curriculum import Curriculum
from training.latents import load_cache
from training.nets import TEXT_WIDTHS, load_token_tables, new_text_towers
from training.optim import Schedule, rank, world_size
from training.prompts import Encoding, PromptEncoder
from training.runs import Run, in_processes, seeded
from training.stages import StateFolder, stage_parser, start_logging

logger = logging.getLogger(__name__)

GRID = 8
TOKENS = 24


class LatentGuess(nn.Module):
    """Guesses (B, 4, 8, 8) latents from an encoding, once from the pooled vector and once from the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.from_pooled = self._head(TEXT_WIDTHS[1])
        self.queries = nn.Parameter(torch.randn(4, sum(TEXT_WIDTHS)) * 0.05)
        self.from_tokens = self._head(4 * sum(TEXT_WIDTHS))

    @staticmethod
    def _head(width: int) -> nn.Module:
        outputs = 4 * GRID * GRID
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 512), nn.GELU(), nn.Linear(512, outputs))

    def forward(self, encoding: Encoding) -> tuple[Tensor, Tensor]:
        """Both guesses."""
        hidden = F.layer_norm(encoding.hidden, encoding.hidden.shape[-1:])
        focus = (hidden @ self.queries.T).softmax(1)  # (B, tokens, 4)
        gathered = torch.einsum("btq,btc->bqc", focus, hidden).flatten(1)
        shape = (-1, 4, GRID, GRID)
        return self.from_pooled(encoding.pooled).view(shape), self.from_tokens(gathered).view(shape)


def train(arguments: argparse.Namespace) -> None:
    """One process of the stage."""
    state = StateFolder(arguments.state)
    art = load_art(state.file("art"))
    towers = new_text_towers(load_token_tables(arguments.tables))
    torch.manual_seed(arguments.seed)
    encoder, guess = PromptEncoder(towers, arguments.vocabulary), LatentGuess()
    run = Run(state.file("runs", "text"), nn.ModuleDict({"text": encoder, "guess": guess}), minutes=arguments.minutes)
    if arguments.resume:
        run.load()
    run.stop_on_signals()
    caches = [load_cache(file) for file in sorted(state.file("latents").glob("64x64-*.safetensors"))]
    latents = torch.cat([cache.latents for cache in caches])
    items = [item for cache in caches for item in cache.items]
    colours = [colour for cache in caches for colour in cache.colours]
    curriculum = Curriculum(art, items, everyday_share=arguments.everyday)
    rng = seeded(arguments.seed, "text", run.samples)
    schedule = Schedule(peak=1e-3, decay_from=arguments.samples // 2, decay_to=arguments.samples)
    losses: list[float] = []
    while run.going(arguments.samples):
        rows = curriculum.draw(arguments.batch, rng=rng)
        texts = []
        for row in rows:
            concept, style = art.items[items[row]]
            texts.append(caption(art.concepts[concept], style, colours[row], rng=rng))
        target = latents[rows].float()
        guesses = guess(encoder(texts, TOKENS))
        loss = sum(F.mse_loss(one, target) for one in guesses) / 2
        loss.backward()
        run.finish_step(arguments.batch * world_size(), schedule.rate(run.samples))
        losses.append(float(loss.detach()))
        if rank() == 0 and run.steps % 50 == 0:
            logger.info("%d samples: squared error %.3f", run.samples, sum(losses) / len(losses))
            losses.clear()
    run.save()


def main() -> None:
    """Train the towers; `runs/text/checkpoint.pt` is what the UNet stage starts from."""
    start_logging()
    parser = stage_parser(__doc__)
    parser.add_argument("--tables", type=Path, required=True, help="checkpoint that holds the frozen token tables")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder with vocab.json and merges.txt")
    parser.add_argument("--samples", type=int, default=60_000)
    parser.add_argument("--batch", type=int, default=64, help="captions per process and step")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--everyday", type=float, default=None, help="share of everyday concepts, 0-1")
    arguments = parser.parse_args()
    in_processes(arguments.processes, train, arguments)


if __name__ == "__main__":
    main()
