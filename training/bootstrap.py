"""Starts a UNet run from an exported checkpoint instead of from nothing, with the same VAE or a better one.

A better VAE has other latents. They are turned, by one 4×4 map folded into it, into those closest to what the
checkpoint's UNet knows.
"""

import logging
import random
from pathlib import Path

from training.art import load_art
from training.checkpoints import read_network, read_vae
from training.latents import encode_pictures
from training.nets import load_vae
from training.runs import Run
from training.stages import StateFolder, stage_parser, start_logging
from training.whiten import alignment, fold

logger = logging.getLogger(__name__)

PICTURES = 96


def main() -> None:
    """Write `runs/unet/checkpoint.pt` and `vae/`."""
    start_logging()
    parser = stage_parser(__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="checkpoint to start from")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder with vocab.json and merges.txt")
    parser.add_argument("--vae", type=Path, default=None, help="diffusers folder of another VAE")
    parser.add_argument("--run", default="unet", help="name of the run's folder")
    arguments = parser.parse_args()
    state = StateFolder(arguments.state)
    vae = read_vae(arguments.weights)
    if arguments.vae is not None:
        art, better = load_art(state.file("art")), load_vae(arguments.vae)
        pictures = random.Random(arguments.seed).sample(art.pick(), PICTURES)
        known, latents = (
            encode_pictures(one, art, pictures, height=128, width=128, rng=random.Random(arguments.seed)).latents
            for one in (vae, better)
        )
        fold(better, *alignment(latents, known))
        vae = better
    vae.save_pretrained(state.file("vae"))
    run = Run(state.file("runs", arguments.run), read_network(arguments.weights, arguments.vocabulary))
    run.save()


if __name__ == "__main__":
    main()
