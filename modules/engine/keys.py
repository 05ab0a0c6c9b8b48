"""Names of tensors: the original single-file layouts to diffusers' and transformers' names."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_L_PREFIX = "conditioner.embedders.0.transformer.text_model."
CLIP_G_PREFIX = "conditioner.embedders.1.model."
REFINER_CLIP_G_PREFIX = "conditioner.embedders.0.model."
SD15_CLIP_PREFIX = "cond_stage_model.transformer.text_model."

RESNET_NAMES = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
UNET_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
VAE_ATTENTION = (
    ("norm.", "group_norm."),
    ("q.", "to_q."),
    ("k.", "to_k."),
    ("v.", "to_v."),
    ("proj_out.", "to_out.0."),
)
OPEN_CLIP_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
OPEN_CLIP_LAYER = (
    ("attn.out_proj", "self_attn.out_proj"),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
)


@dataclass(frozen=True)
class BlockPosition:
    """Where a numbered block of the original UNet sits: level, and layer in it (None: the downsampler)."""

    level: int
    layer: int | None


def input_positions(layers: Sequence[int]) -> dict[int, BlockPosition]:
    """Number of an original input block → its place; `layers` counts the resnets of each level.

    Block 0 is the first convolution; every level but the last ends with a downsampler.
    """
    positions: dict[int, BlockPosition] = {}
    number = 1
    for level, count in enumerate(layers):
        for layer in range(count):
            positions[number] = BlockPosition(level, layer)
            number += 1
        positions[number] = BlockPosition(level, None)
        number += 1
    return positions


def output_positions(layers: Sequence[int]) -> dict[int, BlockPosition]:
    """Number of an original output block → its place.

    Up blocks run from the deepest level and have one layer more than the down blocks.
    """
    positions: dict[int, BlockPosition] = {}
    number = 0
    for level, count in enumerate(reversed(layers)):
        for layer in range(count + 1):
            positions[number] = BlockPosition(level, layer)
            number += 1
    return positions


def unet_names(originals: Iterable[str], layers: Sequence[int]) -> dict[str, str]:
    """Original UNet names (without prefix) → diffusers names, for `layers` resnets per level.

    Names that no SDXL-shaped UNet has are left out.
    """
    inputs, outputs = input_positions(layers), output_positions(layers)
    named = {name: _unet_name(name, inputs, outputs) for name in originals}
    return {original: name for original, name in named.items() if name}


def _unet_name(name: str, inputs: dict[int, BlockPosition], outputs: dict[int, BlockPosition]) -> str | None:
    stem, _, last = name.rpartition(".")
    if stem in UNET_ENDS:
        return f"{UNET_ENDS[stem]}.{last}"
    section, _, rest = name.partition(".")
    number, _, rest = rest.partition(".")
    if section == "middle_block" and number.isdigit():
        return _middle_name(int(number), rest)
    module, _, rest = rest.partition(".")
    positions = {"input_blocks": inputs, "output_blocks": outputs}.get(section, {})
    position = positions.get(int(number)) if number.isdigit() else None
    if position is None:
        return None
    side = "down_blocks" if section == "input_blocks" else "up_blocks"
    place = f"{side}.{position.level}"
    if position.layer is None:
        return f"{place}.downsamplers.0.conv.{rest.removeprefix('op.')}" if rest.startswith("op.") else None
    if rest.startswith("conv."):  # an upsampler is the last module of a level's last output block
        return f"{place}.upsamplers.0.{rest}"
    if module == "0":
        resnet = _resnet_name(rest)
        return f"{place}.resnets.{position.layer}.{resnet}" if resnet else None
    return f"{place}.attentions.{position.layer}.{rest}" if module == "1" else None


def _middle_name(number: int, rest: str) -> str | None:
    """Names in the middle block: resnet, then transformer and a second resnet where there are any."""
    if number == 1:
        return f"mid_block.attentions.0.{rest}"
    resnet = _resnet_name(rest)
    return f"mid_block.resnets.{number // 2}.{resnet}" if resnet else None


def _resnet_name(name: str) -> str | None:
    for original, ours in RESNET_NAMES:
        if name.startswith(original + "."):
            return ours + name[len(original) :]
    return None


def vae_names(originals: Iterable[str], levels: int) -> dict[str, str]:
    """Original VAE names (without prefix) → diffusers names, for a VAE of `levels` resolutions."""
    named = {name: _vae_name(name, levels) for name in originals}
    return {original: name for original, name in named.items() if name}


def _vae_name(name: str, levels: int) -> str | None:
    side, _, rest = name.partition(".")
    if side in ("quant_conv", "post_quant_conv"):
        return name
    if side not in ("encoder", "decoder"):
        return None
    rest = rest.replace("nin_shortcut", "conv_shortcut")
    if rest.startswith("norm_out."):
        return f"{side}.conv_{rest}"
    if match := re.match(r"(down|up)\.(\d+)\.(?:block\.(\d+)\.(.+)|(?:down|up)sample\.conv\.(\w+))$", rest):
        way, level, layer, inside, end = match.groups()
        place = f"{side}.down_blocks.{level}" if way == "down" else f"{side}.up_blocks.{levels - 1 - int(level)}"
        return f"{place}.resnets.{layer}.{inside}" if inside else f"{place}.{way}samplers.0.conv.{end}"
    if match := re.match(r"mid\.block_(\d+)\.(.+)$", rest):
        return f"{side}.mid_block.resnets.{int(match[1]) - 1}.{match[2]}"
    if rest.startswith("mid.attn_1."):
        inside = rest.removeprefix("mid.attn_1.")
        for original, ours in VAE_ATTENTION:
            if inside.startswith(original):
                return f"{side}.mid_block.attentions.0.{ours}{inside[len(original) :]}"
    return f"{side}.{rest}" if rest.startswith(("conv_in.", "conv_out.")) else None


def open_clip_names(originals: Iterable[str]) -> dict[str, str]:
    """OpenCLIP text tower names (without prefix) → names of CLIPTextModel, the fused in_proj left out."""
    named: dict[str, str] = {}
    for name in originals:
        if name in OPEN_CLIP_ENDS:
            named[name] = OPEN_CLIP_ENDS[name]
        elif match := re.match(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)$", name):
            for original, ours in OPEN_CLIP_LAYER:
                if match[2] == original:
                    named[name] = f"encoder.layers.{match[1]}.{ours}.{match[3]}"
    return named
