"""Writes trained networks as a single-file SDXL checkpoint in two shards, float16, with what shapes cannot tell.

The names and the frozen token tables come from an earlier checkpoint of the family, so that the first shard never
changes and the layouts are equal by construction.
"""

import argparse
import json
import logging
import random
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from modules.engine import keys
from modules.engine.tensorfile import open_tensor_file
from training.art import load_art
from training.latents import encode_pixels
from training.nets import LAYERS, NATIVE_PX, TEXT_HEADS, VAE_LEVELS, load_vae
from training.pictures import compose, random_colour
from training.runs import averaged_weights
from training.stages import StateFolder, stage_parser, start_logging
from training.unet import build_network

logger = logging.getLogger(__name__)

SHARD_LIMIT_BYTES = 60_000_000
TABLE_SUFFIX = "token_embedding.weight"
PREVIEW_PICTURES = 96


def original_tensors(
    originals: Mapping[str, tuple[int, ...]], unet: nn.Module, text: nn.Module, vae: nn.Module
) -> dict[str, Tensor]:
    """Every tensor of `originals` (name → shape) but the token tables, taken from the networks, float32.

    Raises:
        KeyError: a name that the networks have no tensor for.
        ValueError: a tensor of another shape.
    """
    state = {f"unet.{name}": tensor for name, tensor in unet.state_dict().items()}
    state |= {f"vae.{name}": tensor for name, tensor in vae.state_dict().items()}
    # transformers 5 dropped the text_model. prefix of one class and kept it for the other
    state |= {name.replace("text_model.", ""): tensor for name, tensor in text.state_dict().items()}
    found = {}
    for name, shape in originals.items():
        if name.endswith(TABLE_SUFFIX):
            continue
        tensor = _tensor(name, state)
        found[name] = tensor.reshape(shape) if tensor.numel() == torch.Size(shape).numel() else tensor
        if tuple(found[name].shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
    return found


def _tensor(name: str, state: Mapping[str, Tensor]) -> Tensor:
    if name.startswith(keys.UNET_PREFIX):
        stem = name.removeprefix(keys.UNET_PREFIX)
        return state["unet." + keys.unet_names([stem], LAYERS)[stem]]
    if name.startswith(keys.VAE_PREFIX):
        stem = name.removeprefix(keys.VAE_PREFIX)
        return state["vae." + keys.vae_names([stem], VAE_LEVELS)[stem]]
    if name.startswith(keys.CLIP_L_PREFIX):
        return state["first." + name.removeprefix(keys.CLIP_L_PREFIX)]
    stem = name.removeprefix(keys.CLIP_G_PREFIX)
    if stem == "text_projection":
        return state["second.text_projection.weight"].T
    if ".attn.in_proj_" in stem:
        block, end = stem.split(".attn.in_proj_")
        layer = block.rpartition(".")[2]
        return torch.cat([state[f"second.encoder.layers.{layer}.self_attn.{part}_proj.{end}"] for part in "qkv"])
    return state["second." + keys.open_clip_names([stem])[stem]]


def latent_rgb(latents: Tensor, pixels: Tensor) -> dict[str, list[object]]:
    """The linear map from latents to colours in −1…1 that fits these pictures best.

    Args:
        latents: (B, 4, h, w), times SCALING_FACTOR.
        pixels: (B, 3, 8h, 8w).
    Returns:
        {"factors": four rows of red, green, blue; "bias": one row}.
    """
    design = latents.float().permute(0, 2, 3, 1).reshape(-1, 4)
    design = torch.cat([design, torch.ones(len(design), 1)], dim=1)
    colours = F.avg_pool2d(pixels, 8).permute(0, 2, 3, 1).reshape(-1, 3)
    rows = [[round(value, 4) for value in row] for row in torch.linalg.lstsq(design, colours).solution.tolist()]
    return {"factors": list(rows[:4]), "bias": list(rows[4])}


def header(preview: Mapping[str, list[object]], *, title: str) -> dict[str, str]:
    """Metadata of the second shard."""
    return {
        "format": "pt",
        "focale.format": "1",
        "focale.text_encoder.heads": str(TEXT_HEADS[0]),
        "focale.text_encoder_2.heads": str(TEXT_HEADS[1]),
        "focale.text_encoder.hidden_act": "quick_gelu",
        "focale.text_encoder_2.hidden_act": "gelu",
        "focale.native_size": str(NATIVE_PX),
        "focale.latent_rgb": json.dumps(preview),
        "focale.vae.norm_num_groups": "16",
        "modelspec.title": title,
        "modelspec.license": "Apache-2.0; artwork notices in NOTICE.md",
    }


def write_shards(template: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str], target: Path) -> list[Path]:
    """Write TARGET-00001-of-00002.safetensors (the template's token tables) and …-00002-… (the rest).

    Raises:
        ValueError: a shard is larger than 60 MB, or a weight does not fit float16.
    """
    tables = open_tensor_file(template)
    first = {name: tables.read(name).contiguous() for name in tables.shapes if name.endswith(TABLE_SUFFIX)}
    second = {name: tensor.detach().half().contiguous().clone() for name, tensor in tensors.items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (part, extra) in enumerate(((first, {"format": "pt"}), (second, metadata)), start=1):
        if sum(tensor.numel() * tensor.element_size() for tensor in part.values()) > SHARD_LIMIT_BYTES:
            raise ValueError(f"shard {number} is larger than {SHARD_LIMIT_BYTES} bytes")
        if not all(tensor.isfinite().all() for tensor in part.values()):
            raise ValueError(f"shard {number} has weights beyond float16's range")
        file = target.with_name(f"{target.name}-{number:05d}-of-00002.safetensors")
        save_file(part, file, metadata=extra)
        files.append(file)
    return files


def load_trained(checkpoint: Path, tables: Path, vocabulary: Path) -> nn.ModuleDict:
    """UNet and text towers with the moving-average weights of a run."""
    network = build_network(tables, vocabulary, seed=0)
    missing, unexpected = network.load_state_dict(averaged_weights(checkpoint), strict=False)
    lacking = [name for name in missing if "token_embedding" not in name and "position_ids" not in name]
    if lacking or unexpected:
        raise ValueError(f"{checkpoint} does not fit: missing {lacking}, unexpected {unexpected}")
    return network.eval()


def export(arguments: argparse.Namespace) -> list[Path]:
    """Export one run."""
    state = StateFolder(arguments.state)
    art, vae = load_art(state.file("art")), load_vae(state.file("vae"))
    network = load_trained(state.file("runs", arguments.run, "checkpoint.pt"), arguments.tables, arguments.vocabulary)
    rng = random.Random(arguments.seed)
    pictures = rng.sample(art.pick(), min(PREVIEW_PICTURES, len(art.pick())))
    pixels = compose(art, pictures, [random_colour(rng) for _ in pictures], rng=rng)
    preview = latent_rgb(encode_pixels(vae, pixels), pixels)
    shapes = open_tensor_file(arguments.template).shapes
    tensors = original_tensors(shapes, network["unet"], network["text"], vae)
    return write_shards(arguments.template, tensors, header(preview, title=arguments.title), arguments.target)


def main() -> None:
    """Export the moving-average weights of a run, with the state folder's VAE."""
    start_logging()
    parser = stage_parser(__doc__)
    parser.add_argument("--template", type=Path, required=True, help="earlier checkpoint, NAME.safetensors (or shards)")
    parser.add_argument("--tables", type=Path, required=True, help="checkpoint that holds the frozen token tables")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder with vocab.json and merges.txt")
    parser.add_argument("--run", default="unet", help="name of the run's folder")
    parser.add_argument("--target", type=Path, required=True, help="path and name without the shard's number")
    parser.add_argument("--title", default="Focale tiny")
    for file in export(parser.parse_args()):
        logger.info("%s: %d bytes", file, file.stat().st_size)


if __name__ == "__main__":
    main()
