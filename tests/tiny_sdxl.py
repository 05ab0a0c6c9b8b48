"""Builds tiny random checkpoints in the original single-file layouts, for tests that need a model but no picture."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

Layout = Literal["sdxl", "ssd1b", "refiner", "sd15"]
VOCABULARY = 49408
CLIP_L_WIDTH = 64
CLIP_G_WIDTH = 128
TIME_ID_WIDTH = 32
CLIP_LAYERS = 3
VAE_WIDTHS = (32, 32, 64, 64)


@dataclass(frozen=True)
class UNetPlan:
    """Build of a UNet: widths of the levels, and transformer depths going down, up and in the middle."""

    widths: tuple[int, ...]
    depths: tuple[tuple[int, ...], ...]
    up_depths: tuple[tuple[int, ...], ...]
    middle_depth: int | None
    context: int
    vector: int
    linear: bool = True


PLANS: dict[Layout, UNetPlan] = {
    "sdxl": UNetPlan(
        (64, 64, 128),
        ((0, 0), (1, 1), (2, 2)),
        ((2, 2, 2), (1, 1, 1), (0, 0, 0)),
        2,
        CLIP_L_WIDTH + CLIP_G_WIDTH,
        CLIP_G_WIDTH + 6 * TIME_ID_WIDTH,
    ),
    "ssd1b": UNetPlan(
        (64, 64, 128),
        ((0, 0), (2, 2), (4, 4)),
        ((4, 4, 10), (2, 1, 1), (0, 0, 0)),
        None,
        CLIP_L_WIDTH + CLIP_G_WIDTH,
        CLIP_G_WIDTH + 6 * TIME_ID_WIDTH,
    ),
    "refiner": UNetPlan(
        (64, 64, 128, 128),
        ((0, 0), (2, 2), (2, 2), (0, 0)),
        ((0, 0, 0), (2, 2, 2), (2, 2, 2), (0, 0, 0)),
        2,
        CLIP_G_WIDTH,
        CLIP_G_WIDTH + 5 * TIME_ID_WIDTH,
    ),
    "sd15": UNetPlan(
        (64, 64, 128, 128),
        ((1, 1), (1, 1), (1, 1), (0, 0)),
        ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
        1,
        768,
        0,
        linear=False,
    ),
}


@dataclass
class TensorWriter:
    """Collects named random tensors, scaled so that a forward pass keeps its values near 1."""

    generator: torch.Generator
    dtype: torch.dtype
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def put(self, name: str, *shape: int, scale: float | None = None, centre: float = 0.0) -> None:
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else shape[0]
        values = torch.randn(shape, generator=self.generator) * (fan_in**-0.5 if scale is None else scale)
        self.tensors[name] = (values + centre).to(self.dtype)

    def layer(self, name: str, *shape: int, bias: bool = True) -> None:
        self.put(f"{name}.weight", *shape)
        if bias:
            self.put(f"{name}.bias", shape[0], scale=0.02)

    def norm(self, name: str, width: int) -> None:
        self.put(f"{name}.weight", width, scale=0.02, centre=1.0)
        self.put(f"{name}.bias", width, scale=0.02)


def write_tiny(path: Path, layout: Layout = "sdxl", *, seed: int = 0, dtype: torch.dtype = torch.float16) -> Path:
    """Writes a tiny checkpoint of a layout and gives its path; the same seed gives the same weights."""
    save_file(tiny_tensors(layout, seed=seed, dtype=dtype), path)
    return path


def tiny_tensors(layout: Layout = "sdxl", *, seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """The tensors of a tiny checkpoint, by their original names."""
    writer = TensorWriter(torch.Generator().manual_seed(seed), dtype)
    write_unet(writer, PLANS[layout])
    write_vae(writer)
    if layout in ("sdxl", "ssd1b"):
        write_clip(writer, "conditioner.embedders.0.transformer.text_model.", CLIP_L_WIDTH)
        write_open_clip(writer, "conditioner.embedders.1.model.", CLIP_G_WIDTH)
    elif layout == "refiner":
        write_open_clip(writer, "conditioner.embedders.0.model.", CLIP_G_WIDTH)
    return writer.tensors


def write_unet(writer: TensorWriter, plan: UNetPlan, prefix: str = "model.diffusion_model.") -> None:
    """The UNet, block by block in the original numbering."""
    width, time = plan.widths[0], 4 * plan.widths[0]
    writer.layer(f"{prefix}time_embed.0", time, width)
    writer.layer(f"{prefix}time_embed.2", time, time)
    if plan.vector:
        writer.layer(f"{prefix}label_emb.0.0", time, plan.vector)
        writer.layer(f"{prefix}label_emb.0.2", time, time)
    writer.layer(f"{prefix}input_blocks.0.0", width, 4, 3, 3)
    skips, number = [width], 1
    for level, depths in enumerate(plan.depths):
        for depth in depths:
            _resnet(writer, f"{prefix}input_blocks.{number}.0.", width, plan.widths[level], time)
            width = plan.widths[level]
            _transformer(writer, f"{prefix}input_blocks.{number}.1.", width, depth, plan)
            skips.append(width)
            number += 1
        if level < len(plan.depths) - 1:
            writer.layer(f"{prefix}input_blocks.{number}.0.op", width, width, 3, 3)
            skips.append(width)
            number += 1
    _resnet(writer, f"{prefix}middle_block.0.", width, width, time)
    if plan.middle_depth is not None:
        _transformer(writer, f"{prefix}middle_block.1.", width, plan.middle_depth, plan)
        _resnet(writer, f"{prefix}middle_block.2.", width, width, time)
    _write_output_blocks(writer, plan, prefix, skips)
    writer.norm(f"{prefix}out.0", plan.widths[0])
    writer.layer(f"{prefix}out.2", 4, plan.widths[0], 3, 3)


def _write_output_blocks(writer: TensorWriter, plan: UNetPlan, prefix: str, skips: list[int]) -> None:
    number, width = 0, plan.widths[-1]
    for level, depths in enumerate(plan.up_depths):
        out = plan.widths[-1 - level]
        for layer, depth in enumerate(depths):
            block = f"{prefix}output_blocks.{number}."
            _resnet(writer, f"{block}0.", width + skips.pop(), out, 4 * plan.widths[0])
            width = out
            _transformer(writer, f"{block}1.", width, depth, plan)
            if layer == len(depths) - 1 and level < len(plan.up_depths) - 1:
                writer.layer(f"{block}{2 if depth else 1}.conv", width, width, 3, 3)
            number += 1


def _resnet(writer: TensorWriter, prefix: str, width: int, out: int, time: int) -> None:
    writer.norm(f"{prefix}in_layers.0", width)
    writer.layer(f"{prefix}in_layers.2", out, width, 3, 3)
    writer.layer(f"{prefix}emb_layers.1", out, time)
    writer.norm(f"{prefix}out_layers.0", out)
    writer.layer(f"{prefix}out_layers.3", out, out, 3, 3)
    if width != out:
        writer.layer(f"{prefix}skip_connection", out, width, 1, 1)


def _transformer(writer: TensorWriter, prefix: str, width: int, depth: int, plan: UNetPlan) -> None:
    if not depth:
        return
    kernel = () if plan.linear else (1, 1)
    writer.norm(f"{prefix}norm", width)
    writer.layer(f"{prefix}proj_in", width, width, *kernel)
    writer.layer(f"{prefix}proj_out", width, width, *kernel)
    for index in range(depth):
        block = f"{prefix}transformer_blocks.{index}."
        for attention, source in (("attn1", width), ("attn2", plan.context)):
            writer.layer(f"{block}{attention}.to_q", width, width, bias=False)
            writer.layer(f"{block}{attention}.to_k", width, source, bias=False)
            writer.layer(f"{block}{attention}.to_v", width, source, bias=False)
            writer.layer(f"{block}{attention}.to_out.0", width, width)
        writer.layer(f"{block}ff.net.0.proj", 8 * width, width)
        writer.layer(f"{block}ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            writer.norm(f"{block}{norm}", width)


def write_vae(
    writer: TensorWriter,
    prefix: str = "first_stage_model.",
    *,
    widths: Sequence[int] = VAE_WIDTHS,
    layers: int = 1,
) -> None:
    """The VAE: `layers` resnets per level going down, one more going up, 8 pixels per latent."""
    writer.layer(f"{prefix}quant_conv", 8, 8, 1, 1)
    writer.layer(f"{prefix}post_quant_conv", 4, 4, 1, 1)
    width = widths[0]
    writer.layer(f"{prefix}encoder.conv_in", width, 3, 3, 3)
    for level, out in enumerate(widths):
        for block in range(layers):
            _vae_resnet(writer, f"{prefix}encoder.down.{level}.block.{block}.", width, out)
            width = out
        if level < len(widths) - 1:
            writer.layer(f"{prefix}encoder.down.{level}.downsample.conv", width, width, 3, 3)
    _vae_ends(writer, f"{prefix}encoder.", width, widths[-1], 8)
    writer.layer(f"{prefix}decoder.conv_in", width, 4, 3, 3)
    for level in reversed(range(len(widths))):
        for block in range(layers + 1):
            _vae_resnet(writer, f"{prefix}decoder.up.{level}.block.{block}.", width, widths[level])
            width = widths[level]
        if level:
            writer.layer(f"{prefix}decoder.up.{level}.upsample.conv", width, width, 3, 3)
    _vae_ends(writer, f"{prefix}decoder.", widths[-1], widths[0], 3)


def _vae_resnet(writer: TensorWriter, prefix: str, width: int, out: int) -> None:
    writer.norm(f"{prefix}norm1", width)
    writer.layer(f"{prefix}conv1", out, width, 3, 3)
    writer.norm(f"{prefix}norm2", out)
    writer.layer(f"{prefix}conv2", out, out, 3, 3)
    if width != out:
        writer.layer(f"{prefix}nin_shortcut", out, width, 1, 1)


def _vae_ends(writer: TensorWriter, prefix: str, middle: int, last: int, out: int) -> None:
    _vae_resnet(writer, f"{prefix}mid.block_1.", middle, middle)
    writer.norm(f"{prefix}mid.attn_1.norm", middle)
    for part in ("q", "k", "v", "proj_out"):
        writer.layer(f"{prefix}mid.attn_1.{part}", middle, middle, 1, 1)
    _vae_resnet(writer, f"{prefix}mid.block_2.", middle, middle)
    writer.norm(f"{prefix}norm_out", last)
    writer.layer(f"{prefix}conv_out", out, last, 3, 3)


def write_clip(writer: TensorWriter, prefix: str, width: int, *, layers: int = CLIP_LAYERS) -> None:
    """A CLIP text tower under transformers' names."""
    writer.put(f"{prefix}embeddings.token_embedding.weight", VOCABULARY, width, scale=0.5)
    writer.put(f"{prefix}embeddings.position_embedding.weight", 77, width, scale=0.2)
    for layer in range(layers):
        block = f"{prefix}encoder.layers.{layer}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            writer.layer(f"{block}self_attn.{part}", width, width)
        _mlp(writer, block, width, ("layer_norm1", "layer_norm2"), ("mlp.fc1", "mlp.fc2"))
    writer.norm(f"{prefix}final_layer_norm", width)


def write_open_clip(writer: TensorWriter, prefix: str, width: int, *, layers: int = CLIP_LAYERS) -> None:
    """A CLIP text tower under OpenCLIP's names: fused in_proj, projection used as x @ P."""
    writer.put(f"{prefix}token_embedding.weight", VOCABULARY, width, scale=0.5)
    writer.put(f"{prefix}positional_embedding", 77, width, scale=0.2)
    for layer in range(layers):
        block = f"{prefix}transformer.resblocks.{layer}."
        writer.put(f"{block}attn.in_proj_weight", 3 * width, width)
        writer.put(f"{block}attn.in_proj_bias", 3 * width, scale=0.02)
        writer.layer(f"{block}attn.out_proj", width, width)
        _mlp(writer, block, width, ("ln_1", "ln_2"), ("mlp.c_fc", "mlp.c_proj"))
    writer.norm(f"{prefix}ln_final", width)
    writer.put(f"{prefix}text_projection", width, width)
    writer.put(f"{prefix}logit_scale", 1)


def _mlp(writer: TensorWriter, block: str, width: int, norms: Sequence[str], layers: Sequence[str]) -> None:
    for norm in norms:
        writer.norm(f"{block}{norm}", width)
    writer.layer(f"{block}{layers[0]}", 4 * width, width)
    writer.layer(f"{block}{layers[1]}", width, 4 * width)
