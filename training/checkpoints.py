"""Reads the family's networks back from an exported checkpoint, so that training goes on without its old state."""

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import nn

from modules.engine import keys
from modules.engine.formats import NumberFormat
from modules.engine.tensorfile import open_tensor_file
from modules.engine.weights import build_clip_g, build_clip_l, build_unet, build_vae, recognise
from training.nets import SCALING_FACTOR
from training.prompts import PromptEncoder


def read_vae(checkpoint: Path) -> AutoencoderKL:
    """The VAE of an exported checkpoint, float32."""
    return build_vae(
        open_tensor_file(checkpoint), scaling_factor=SCALING_FACTOR, number_format=NumberFormat.plain(torch.float32)
    )


def read_network(checkpoint: Path, vocabulary: Path) -> nn.ModuleDict:
    """UNet and text towers of an exported checkpoint, float32, trainable but for the token tables."""
    file = open_tensor_file(checkpoint)
    towers = (
        build_clip_l(file, keys.CLIP_L_PREFIX, number_format=NumberFormat.plain(torch.float32)),
        build_clip_g(file, keys.CLIP_G_PREFIX, number_format=NumberFormat.plain(torch.float32)),
    )
    unet = build_unet(file, recognise(file), number_format=NumberFormat.plain(torch.float32))
    network = nn.ModuleDict({"unet": unet, "text": PromptEncoder(towers, vocabulary)})
    network.requires_grad_(True)
    for tower in towers:
        tower.get_input_embeddings().requires_grad_(False)
    return network
