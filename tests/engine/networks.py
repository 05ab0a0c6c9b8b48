"""Tiny random networks of the SDXL architecture, built in milliseconds."""

from dataclasses import dataclass, replace

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from modules.engine.condition import Conditioning
from modules.engine.device import FORMATS, DevicePolicy, Precision, choose_policy
from modules.engine.formats import NumberFormat

TEXT_WIDTH, POOLED_WIDTH = 16, 8


def tiny_unet(
    seed: int = 0, dtype: torch.dtype = torch.float32, widths: tuple[int, ...] = (16, 32, 64)
) -> UNet2DConditionModel:
    """A UNet of SDXL's shape with narrow layers; (B, 4, h, w) like any other."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=widths,
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 1),
            attention_head_dim=(1, 2, 4),
            cross_attention_dim=TEXT_WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=POOLED_WIDTH + 6 * 8,
            norm_num_groups=4,
        )
    return unet.to(dtype).eval().requires_grad_(False)


def widened_policy(stored: Precision) -> DevicePolicy:
    """UNet and text encoders kept in a half format and computed in float32, as on any CPU without bfloat16."""
    number_format = NumberFormat(computed=torch.float32, stored=FORMATS[stored])
    return replace(choose_policy("cpu"), unet=number_format, text=number_format, asked=frozenset({"unet", "text"}))


def tiny_conditioning(seed: int, batch: int = 1, tokens: int = 77, *, late_size: float = 128.0) -> Conditioning:
    """Random text, a size of 192 for the first part of the run and of `late_size` for the rest."""
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(
        torch.randn(batch, tokens, TEXT_WIDTH, generator=generator),
        torch.randn(batch, POOLED_WIDTH, generator=generator),
        torch.full((batch, 6), 192.0),
        torch.full((batch, 6), late_size),
    )


@dataclass
class CallUNet:
    """A forward pass with fixed inputs."""

    unet: UNet2DConditionModel

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        text = tiny_conditioning(4, batch=2)
        added = {"text_embeds": text.pooled_prompt_embeds, "time_ids": text.time_ids}
        return self.unet(x, torch.tensor(500), text.prompt_embeds, added_cond_kwargs=added, return_dict=False)[0]
