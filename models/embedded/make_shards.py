"""Splits a checkpoint into the shards of the embedded model and writes down what shapes cannot tell.

Run from the repository: `PYTHONPATH=. python models/embedded/make_shards.py SOURCE --title "…"`.
The token tables, which training never changes, go into the first shard: a new model replaces the second only.
"""

import argparse
import json
import logging
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from modules.engine.tensorfile import TensorFile, open_tensor_file
from modules.engine.weights import SDXL_SCALING_FACTOR, build_vae

logger = logging.getLogger(__name__)

TABLES = ("token_embedding.weight",)
SHARD_LIMIT_BYTES = 60_000_000
SIZES = {
    "focale.format": "1",
    "focale.text_encoder.heads": "4",
    "focale.text_encoder_2.heads": "6",
    "focale.text_encoder.hidden_act": "quick_gelu",
    "focale.text_encoder_2.hidden_act": "gelu",
    "focale.native_size": "128",
    "focale.vae.norm_num_groups": "16",
}


def colour_pictures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, 3, size, size) in −1…1: plain grounds with soft discs, of random colours."""
    axis = torch.linspace(-1, 1, size)
    rows, columns = axis.view(1, 1, -1, 1), axis.view(1, 1, 1, -1)
    pictures = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, -1, size, size)
    for _ in range(4):
        centre = torch.rand(2, count, 1, 1, 1, generator=generator) * 2 - 1
        radius = 0.2 + 0.6 * torch.rand(count, 1, 1, 1, generator=generator)
        distance = ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2).sqrt()
        disc = torch.sigmoid((radius - distance) * 40)
        pictures = pictures + disc * (torch.rand(count, 3, 1, 1, generator=generator) - pictures)
    return pictures * 2 - 1


@torch.inference_mode()
def fit_latent_rgb(file: TensorFile) -> dict[str, list[object]]:
    """The linear map from latents (model space) to colours in −1…1 that fits `colour_pictures` best."""
    vae = build_vae(file, scaling_factor=SDXL_SCALING_FACTOR, dtype=torch.float32)
    pictures = colour_pictures(64, 128, torch.Generator().manual_seed(0))
    means = [vae.encode(part).latent_dist.mean for part in pictures.split(8)]
    latents = torch.cat(means).mul(SDXL_SCALING_FACTOR).permute(0, 2, 3, 1).reshape(-1, 4)
    colours = functional.avg_pool2d(pictures, 8).permute(0, 2, 3, 1).reshape(-1, 3)
    design = torch.cat([latents, torch.ones(len(latents), 1)], dim=1)
    solution = torch.linalg.lstsq(design, colours).solution
    error = (design @ solution - colours).square().mean().sqrt()
    logger.info("Latents to colours: root mean squared error %.3f of 2.", error)
    rounded = [[round(value, 4) for value in row] for row in solution.tolist()]
    return {"factors": list(rounded[:4]), "bias": list(rounded[4])}


def write_shards(source: Path, folder: Path, name: str, *, title: str, licence: str) -> list[Path]:
    """Writes NAME-00001-of-00002.safetensors (token tables) and NAME-00002-of-00002.safetensors (the rest).

    Raises:
        ValueError: a shard would be larger than 60 MB.
    """
    file = open_tensor_file(source)
    file.metadata |= SIZES
    metadata = SIZES | {
        "focale.latent_rgb": json.dumps(fit_latent_rgb(file)),
        "modelspec.title": title,
        "modelspec.license": licence,
    }
    tables = {key: file.read(key) for key in file.shapes if key.endswith(TABLES)}
    rest = {key: file.read(key) for key in file.shapes if key not in tables}
    paths = [folder / f"{name}-0000{index}-of-00002.safetensors" for index in (1, 2)]
    for path, tensors, header in zip(paths, (tables, rest), ({"format": "pt"}, metadata), strict=True):
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if size > SHARD_LIMIT_BYTES:
            raise ValueError(f"{path.name} would have {size:,} bytes; at most {SHARD_LIMIT_BYTES:,} are allowed.")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=header)
    return paths


def main() -> None:
    """Reads the command line and writes the shards beside this script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--name", default="focale-tiny")
    parser.add_argument("--title", default="Focale tiny")
    parser.add_argument("--license", default="Apache-2.0; artwork notices in NOTICE.md")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = Path(__file__).parent
    for path in write_shards(options.source, folder, options.name, title=options.title, licence=options.license):
        logger.info("%s: %d bytes", path.name, path.stat().st_size)


if __name__ == "__main__":
    main()
