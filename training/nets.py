"""The shapes of the embedded family's networks, and their folders in a state folder.

Everything that reads a size of the family reads it here. The architecture is SDXL's with smaller numbers.
"""

from pathlib import Path
from typing import cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SCALING_FACTOR = 0.13025  # SDXL's own; the VAE is normalised so that scaled latents have unit variance
NATIVE_PX = 128
DOWNSCALE = 8
TEXT_HEADS = (4, 6)
TEXT_WIDTHS = (128, 192)
VOCABULARY = 49408
BEGIN_TOKEN, END_TOKEN = 49406, 49407
LAYERS = (2, 2, 2)  # resnets per level of the UNet
VAE_LEVELS = 4
TRAIN_STEPS, BETA_START, BETA_END = 1000, 0.00085, 0.012


def new_vae() -> AutoencoderKL:
    """A VAE of the family with fresh weights: eightfold downscaling to 4 channels, 3.9 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=NATIVE_PX,
        scaling_factor=SCALING_FACTOR,
        force_upcast=False,
    )


def new_unet() -> UNet2DConditionModel:
    """A UNet of the family with fresh weights: 16.9 M parameters."""
    channels = (64, 128, 192)
    return UNet2DConditionModel(
        sample_size=NATIVE_PX // DOWNSCALE,
        block_out_channels=channels,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=[width // 64 for width in channels],  # diffusers' misnomer: the number of heads
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=TEXT_WIDTHS[1] + 6 * 32,
        norm_num_groups=32,
    )


def text_config(tower: int) -> CLIPTextConfig:
    """Configuration of text tower 0 (CLIP-L's place) or 1 (CLIP-G's place)."""
    width = TEXT_WIDTHS[tower]
    return CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=4,
        num_attention_heads=TEXT_HEADS[tower],
        max_position_embeddings=77,
        hidden_act=("quick_gelu", "gelu")[tower],
        attn_implementation="eager",  # plain matrix products: the fused backward pass takes seven times as long on CPUs
        bos_token_id=BEGIN_TOKEN,
        eos_token_id=2,  # the library then takes the pooled vector at the largest id, the first end token
        pad_token_id=1,
    )


def new_text_towers(tables: tuple[Tensor, Tensor]) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Both text towers with fresh weights over the frozen token tables (49408, width)."""
    towers = (CLIPTextModel(text_config(0)), CLIPTextModelWithProjection(text_config(1)))
    for tower, table in zip(towers, tables, strict=True):
        embedding = cast(nn.Embedding, tower.get_input_embeddings())
        embedding.weight.data.copy_(table)
        embedding.weight.requires_grad_(False)
    return towers


def load_vae(folder: Path) -> AutoencoderKL:
    """The VAE in a diffusers folder, in evaluation mode."""
    return AutoencoderKL.from_pretrained(folder, local_files_only=True).eval()


TOKEN_TABLE_KEYS = (
    "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
    "conditioner.embedders.1.model.token_embedding.weight",
)


def load_token_tables(file: Path) -> tuple[Tensor, Tensor]:
    """Both frozen token tables, float16, from a checkpoint or its first shard."""
    tensors = load_file(file)
    return tensors[TOKEN_TABLE_KEYS[0]], tensors[TOKEN_TABLE_KEYS[1]]


def alphas_cumprod() -> Tensor:
    """(1000,) float32 share of signal variance at each timestep: SDXL's scaled-linear betas."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()
