"""Recognises Stable Diffusion checkpoints by their tensor shapes, and builds their networks of any width."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.clip.configuration_clip import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

from modules.engine import keys
from modules.engine.formats import NumberFormat, storable_weights, widen_in_use
from modules.engine.tensorfile import TensorFile
from modules.errors import ModelFileUnusable

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
Network = TypeVar("Network", bound=nn.Module)
TextTower = TypeVar("TextTower", CLIPTextModel, CLIPTextModelWithProjection)

HEAD_WIDTH = 64  # of every attention in SDXL, its refiner, its distillations and both CLIP towers
SD15_HEADS = 8  # Stable Diffusion 1 has eight heads at every width instead
SDXL_SCALING_FACTOR = 0.13025
SD15_SCALING_FACTOR = 0.18215
SDXL_LATENT_RGB = (
    (0.3920, 0.4054, 0.4549),
    (-0.2634, -0.0196, 0.0653),
    (0.0568, 0.1687, -0.0755),
    (-0.3112, -0.2359, -0.2076),
)
SD15_LATENT_RGB = (
    (0.3512, 0.2297, 0.3227),
    (0.3250, 0.4974, 0.2350),
    (-0.2829, 0.1762, 0.2721),
    (-0.2120, -0.2616, -0.7177),
)


class Architecture(StrEnum):
    """The families of checkpoints that are told apart; only some can be used."""

    SDXL = "SDXL"
    SDXL_INPAINT = "SDXL inpaint"
    SSD_1B = "SSD-1B"
    VEGA = "Segmind-Vega"
    SDXL_REFINER = "SDXL refiner"
    SD15 = "Stable Diffusion 1.5"
    SD2 = "Stable Diffusion 2"
    UNKNOWN = "unknown"


BASES = (Architecture.SDXL, Architecture.SDXL_INPAINT, Architecture.SSD_1B, Architecture.VEGA)
REFINERS = (*BASES, Architecture.SDXL_REFINER, Architecture.SD15)
DISTILLED_DEPTHS: Mapping[tuple[int, ...], Architecture] = {
    (0, 0, 2, 2, 4, 4): Architecture.SSD_1B,
    (0, 0, 1, 1, 2, 2): Architecture.VEGA,
}


@dataclass(frozen=True)
class LatentRgb:
    """A linear map from one latent (model space) to one colour in −1…1: colour = latent @ factors + bias."""

    factors: tuple[tuple[float, float, float], ...]
    bias: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclass(frozen=True)
class UNetShape:
    """Everything about a UNet that its tensor shapes tell.

    depths: transformer depth of each resnet of each level going down; 0 means no attention.
    up_depths: the same going up from the deepest level.
    middle_depth: None where the middle block has one resnet only.
    """

    in_channels: int
    out_channels: int
    widths: tuple[int, ...]
    depths: tuple[tuple[int, ...], ...]
    up_depths: tuple[tuple[int, ...], ...]
    middle_depth: int | None
    context_width: int
    vector_width: int
    time_width: int
    linear_projection: bool

    @property
    def layers(self) -> tuple[int, ...]:
        """Resnets per level, going down."""
        return tuple(len(level) for level in self.depths)


@dataclass(frozen=True)
class CheckpointFacts:
    """What the header of a checkpoint tells before any tensor is read.

    prediction: what the UNet predicts, "epsilon" or "v_prediction".
    native_size: side in pixels of the pictures it was trained on.
    pooled_width: width of the pooled text vector; 0 where the UNet takes none.
    time_id_width: sinusoid width of each number in `time_ids`; 0 where the UNet takes none.
    """

    architecture: Architecture
    unet: UNetShape
    prediction: Literal["epsilon", "v_prediction"]
    native_size: int
    scaling_factor: float
    latent_rgb: LatentRgb
    pooled_width: int
    time_id_width: int
    title: str


def recognise(file: TensorFile) -> CheckpointFacts:
    """Tells what kind of checkpoint a file is, from names and shapes alone.

    Raises:
        ModelFileUnusable: no UNet in it, or one of another build than Stable Diffusion's.
    """
    shape = unet_shape(file)
    architecture = _architecture(shape, file.shapes)
    sd15_latents = architecture in (Architecture.SD15, Architecture.SD2)
    pooled_width = _pooled_width(file.shapes, shape)
    numbers = 5 if architecture is Architecture.SDXL_REFINER else 6
    metadata = file.metadata
    rgb = metadata.get("focale.latent_rgb")
    return CheckpointFacts(
        architecture=architecture,
        unet=shape,
        prediction="v_prediction" if "v_pred" in file.shapes else "epsilon",
        native_size=int(metadata.get("focale.native_size", 512 if sd15_latents else 1024)),
        scaling_factor=SD15_SCALING_FACTOR if sd15_latents else SDXL_SCALING_FACTOR,
        latent_rgb=_latent_rgb(rgb) if rgb else LatentRgb(SD15_LATENT_RGB if sd15_latents else SDXL_LATENT_RGB),
        pooled_width=pooled_width,
        time_id_width=(shape.vector_width - pooled_width) // numbers if shape.vector_width else 0,
        title=metadata.get("modelspec.title", file.path.stem),
    )


def _latent_rgb(text: str) -> LatentRgb:
    content = json.loads(text)
    rows = tuple((float(r), float(g), float(b)) for r, g, b in content["factors"])
    red, green, blue = content.get("bias", (0.0, 0.0, 0.0))
    return LatentRgb(rows, (float(red), float(green), float(blue)))


def unet_shape(file: TensorFile) -> UNetShape:
    """Reads the build of a UNet from the shapes of its tensors.

    Raises:
        ModelFileUnusable: the file has no UNet in the original single-file layout.
    """
    shapes = without_prefix(file.shapes, keys.UNET_PREFIX)
    try:
        levels = list(_input_levels(shapes))
        first = shapes["input_blocks.0.0.weight"]
        context = next(shape for name, shape in shapes.items() if name.endswith("attn2.to_k.weight"))
        projection = next(shape for name, shape in shapes.items() if name.endswith(".proj_in.weight"))
        layers = [len(level) for level in levels]
        up_depths = tuple(
            tuple(_depth(shapes, f"output_blocks.{number}") for number in numbers)
            for numbers in _output_numbers(layers)
        )
        return UNetShape(
            in_channels=first[1],
            out_channels=shapes["out.2.weight"][0],
            widths=tuple(level[0][0] for level in levels),
            depths=tuple(tuple(depth for _, depth in level) for level in levels),
            up_depths=up_depths,
            middle_depth=_depth(shapes, "middle_block") if "middle_block.2.in_layers.0.weight" in shapes else None,
            context_width=context[1],
            vector_width=shapes.get("label_emb.0.0.weight", (0, 0))[1],
            time_width=shapes["time_embed.0.weight"][0],
            linear_projection=len(projection) == 2,
        )
    except (KeyError, StopIteration, IndexError) as error:
        raise ModelFileUnusable(
            f"{file.path.name!r} is not an SDXL checkpoint: it has no complete UNet in the original single-file layout."
        ) from error


def _input_levels(shapes: Shapes) -> Iterable[list[tuple[int, int]]]:
    """(width, transformer depth) of every resnet, grouped by level; a downsampler ends a level."""
    level: list[tuple[int, int]] = []
    number = 1
    while True:
        if f"input_blocks.{number}.0.op.weight" in shapes:
            yield level
            level = []
        elif resnet := shapes.get(f"input_blocks.{number}.0.in_layers.2.weight"):
            level.append((resnet[0], _depth(shapes, f"input_blocks.{number}")))
        else:
            yield level
            return
        number += 1


def _depth(shapes: Shapes, block: str) -> int:
    depth = 0
    while f"{block}.1.transformer_blocks.{depth}.attn1.to_q.weight" in shapes:
        depth += 1
    return depth


def _output_numbers(layers: list[int]) -> Iterable[list[int]]:
    number = 0
    for count in reversed(layers):
        yield list(range(number, number + count + 1))
        number += count + 1


def _architecture(shape: UNetShape, shapes: Shapes) -> Architecture:
    has_l, has_g = (
        f"{keys.CLIP_L_PREFIX}final_layer_norm.weight" in shapes,
        f"{keys.CLIP_G_PREFIX}ln_final.weight" in shapes,
    )
    if shape.vector_width and has_l and has_g:
        depths = tuple(depth for level in shape.depths for depth in level)
        if shape.middle_depth is None:
            return DISTILLED_DEPTHS.get(depths, Architecture.UNKNOWN)
        return Architecture.SDXL if shape.in_channels == 4 else Architecture.SDXL_INPAINT
    if shape.vector_width and f"{keys.REFINER_CLIP_G_PREFIX}ln_final.weight" in shapes:
        return Architecture.SDXL_REFINER
    if not shape.vector_width and shape.context_width == 768:
        return Architecture.SD15
    if not shape.vector_width and shape.context_width == 1024:
        return Architecture.SD2
    return Architecture.UNKNOWN


def _pooled_width(shapes: Shapes, shape: UNetShape) -> int:
    if not shape.vector_width:
        return 0
    for prefix in (keys.CLIP_G_PREFIX, keys.REFINER_CLIP_G_PREFIX):
        if projection := shapes.get(f"{prefix}text_projection"):
            return projection[1]
        if linear := shapes.get(f"{prefix}text_projection.weight"):
            return linear[0]
    return 0


def without_prefix(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors whose names start with `prefix`, under their names without it."""
    return {name[len(prefix) :]: shape for name, shape in shapes.items() if name.startswith(prefix)}


def build_unet(file: TensorFile, facts: CheckpointFacts, *, number_format: NumberFormat) -> UNet2DConditionModel:
    """The UNet of a checkpoint, in diffusers' class.

    Raises:
        ModelFileUnusable: tensors are missing or have shapes that do not fit together.
    """
    shape = facts.unet
    heads = [width // HEAD_WIDTH for width in shape.widths]
    if facts.architecture is Architecture.SD15:
        heads = [SD15_HEADS] * len(shape.widths)
    originals = without_prefix(file.shapes, keys.UNET_PREFIX)
    names = keys.unet_names(originals, shape.layers)
    unet: UNet2DConditionModel = _build(
        lambda: UNet2DConditionModel(
            sample_size=facts.native_size // 8,
            in_channels=shape.in_channels,
            out_channels=shape.out_channels,
            block_out_channels=shape.widths,
            layers_per_block=_collapse(shape.layers),
            down_block_types=tuple("CrossAttnDownBlock2D" if any(d) else "DownBlock2D" for d in shape.depths),
            up_block_types=tuple("CrossAttnUpBlock2D" if any(d) else "UpBlock2D" for d in shape.up_depths),
            mid_block_type="UNetMidBlock2D" if shape.middle_depth is None else "UNetMidBlock2DCrossAttn",
            transformer_layers_per_block=_down_depths(shape),
            reverse_transformer_layers_per_block=_up_depths(shape),
            cross_attention_dim=shape.context_width,
            attention_head_dim=tuple(heads),
            use_linear_projection=shape.linear_projection,
            time_embedding_dim=None if shape.time_width == 4 * shape.widths[0] else shape.time_width,
            addition_embed_type="text_time" if shape.vector_width else None,
            addition_time_embed_dim=facts.time_id_width or None,
            projection_class_embeddings_input_dim=shape.vector_width or None,
        ),
        file,
        {name: (keys.UNET_PREFIX + original, None) for original, name in names.items()},
        number_format=number_format,
    )
    return unet


def _down_depths(shape: UNetShape) -> tuple[tuple[int, ...] | int, ...]:
    """Depths in diffusers' form; it takes the middle block's depth from the last level, used there or not."""
    depths = [_collapse(level) if any(level) else 1 for level in shape.depths]
    if not any(shape.depths[-1]) and shape.middle_depth:
        depths[-1] = shape.middle_depth
    return tuple(depths)


def _up_depths(shape: UNetShape) -> tuple[tuple[int, ...] | int, ...] | None:
    """Depths of the up blocks in diffusers' form; None where they mirror the down blocks, as in SDXL."""
    if all(set(up) == set(down) for up, down in zip(shape.up_depths, reversed(shape.depths), strict=True)):
        uniform = all(len(set(level)) == 1 for level in shape.depths)
        if uniform:
            return None
    return tuple(_collapse(level) if any(level) else 1 for level in shape.up_depths)


def _collapse(values: tuple[int, ...]) -> tuple[int, ...] | int:
    """One number for equal numbers: the form of the published configurations, which other loaders expect."""
    return values[0] if len(set(values)) == 1 else values


def build_vae(file: TensorFile, *, scaling_factor: float, number_format: NumberFormat) -> AutoencoderKL:
    """The VAE of a checkpoint or of a VAE file, in original or diffusers names.

    Raises:
        ModelFileUnusable: the file holds no VAE.
    """
    prefix = keys.VAE_PREFIX if any(name.startswith(keys.VAE_PREFIX) for name in file.shapes) else ""
    shapes = without_prefix(file.shapes, prefix)
    if "decoder.conv_in.weight" not in shapes or "encoder.conv_in.weight" not in shapes:
        raise ModelFileUnusable(f"{file.path.name!r} holds no VAE.")
    original = "encoder.down.0.block.0.conv1.weight" in shapes
    level_name = (
        "encoder.down.{}.block.{}.conv1.weight" if original else "encoder.down_blocks.{}.resnets.{}.conv1.weight"
    )
    widths: list[int] = []
    while first := shapes.get(level_name.format(len(widths), 0)):
        widths.append(first[0])
    layers = 0
    while level_name.format(0, layers) in shapes:
        layers += 1
    plain = {name: name for name in shapes if not name.endswith("position_ids")}
    names = keys.vae_names(shapes, len(widths)) if original else plain
    attention = any(".mid_block.attentions.0." in name for name in names.values())
    vae: AutoencoderKL = _build(
        lambda: AutoencoderKL(
            latent_channels=shapes["decoder.conv_in.weight"][1],
            block_out_channels=tuple(widths),
            layers_per_block=layers,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            norm_num_groups=int(file.metadata.get("focale.vae.norm_num_groups", 32)),
            scaling_factor=scaling_factor,
            force_upcast=False,
            mid_block_add_attention=attention,
            use_quant_conv="quant_conv.weight" in shapes,
            use_post_quant_conv="post_quant_conv.weight" in shapes,
        ),
        file,
        {
            name: (prefix + source, _flat_attention if ".attentions." in name else None)
            for source, name in names.items()
        },
        number_format=number_format,
    )
    return vae


def _flat_attention(tensor: Tensor) -> Tensor:
    """The original VAE attends by 1×1 convolutions, diffusers by linear layers of the same weights."""
    return tensor.flatten(1) if tensor.ndim == 4 else tensor


def build_clip_l(file: TensorFile, prefix: str, *, number_format: NumberFormat) -> CLIPTextModel:
    """CLIP ViT-L's text tower of a checkpoint.

    Raises:
        ModelFileUnusable: tensors are missing or do not fit together.
    """
    shapes = without_prefix(file.shapes, prefix)
    config = _clip_config(
        file, shapes, "text_encoder", "embeddings.{}_embedding.weight", "encoder.layers.{}.mlp.fc1.weight"
    )
    names = {name: (prefix + name, None) for name in shapes if not name.endswith("position_ids")}
    return _with_positions(_build(lambda: CLIPTextModel(config), file, names, number_format=number_format))


def build_clip_g(file: TensorFile, prefix: str, *, number_format: NumberFormat) -> CLIPTextModelWithProjection:
    """OpenCLIP ViT-bigG's text tower of a checkpoint: its fused in_proj split, its projection transposed.

    Raises:
        ModelFileUnusable: tensors are missing or do not fit together.
    """
    shapes = dict(without_prefix(file.shapes, prefix))
    shapes["position_embedding.weight"] = shapes.get("positional_embedding", (77, 0))
    config = _clip_config(
        file, shapes, "text_encoder_2", "{}_embedding.weight", "transformer.resblocks.{}.mlp.c_fc.weight"
    )
    sources: dict[str, tuple[str, Callable[[Tensor], Tensor] | None]] = {
        f"text_model.{name}": (prefix + original, None) for original, name in keys.open_clip_names(shapes).items()
    }
    for layer in range(config.num_hidden_layers):
        for index, part in enumerate(("q", "k", "v")):
            for end in ("weight", "bias"):
                sources[f"text_model.encoder.layers.{layer}.self_attn.{part}_proj.{end}"] = (
                    f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{end}",
                    lambda fused, index=index: fused.chunk(3)[index],  # type: ignore[misc]
                )
    transposed = "text_projection" in shapes
    projection = "text_projection" if transposed else "text_projection.weight"
    sources["text_projection.weight"] = (prefix + projection, Tensor.t if transposed else None)
    return _with_positions(
        _build(lambda: CLIPTextModelWithProjection(config), file, sources, number_format=number_format)
    )


def _clip_config(file: TensorFile, shapes: Shapes, name: str, embedding: str, layer: str) -> CLIPTextConfig:
    """Sizes of a text tower from its shapes; what shapes do not tell (heads, activation) from the metadata.

    eos_token_id 2 makes transformers pool at the highest token id of a text, its first end token, as CLIP does.
    """
    try:
        vocabulary, width = shapes[embedding.format("token")]
        positions = shapes[embedding.format("position")][0]
        inner = shapes[layer.format(0)][0]
        projection = shapes.get("text_projection", shapes.get("text_projection.weight", (width, width)))
    except KeyError as error:
        raise ModelFileUnusable(f"{file.path.name!r} holds no complete {name}: {error} is missing.") from error
    layers = 0
    while layer.format(layers) in shapes:
        layers += 1
    activation = "quick_gelu" if name == "text_encoder" else "gelu"
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        projection_dim=projection[1] if "text_projection" in shapes else projection[0],
        num_hidden_layers=layers,
        num_attention_heads=int(file.metadata.get(f"focale.{name}.heads", width // HEAD_WIDTH)),
        max_position_embeddings=positions,
        hidden_act=file.metadata.get(f"focale.{name}.hidden_act", activation),
        bos_token_id=49406,
        eos_token_id=2,
        pad_token_id=1,
    )


def _with_positions(tower: TextTower) -> TextTower:
    """Fills the table of position numbers, which no checkpoint stores."""
    embeddings = (tower.text_model if isinstance(tower, CLIPTextModelWithProjection) else tower).embeddings
    embeddings.position_ids = torch.arange(tower.config.max_position_embeddings)[None]
    return tower


class _Unfilled(TorchFunctionMode):
    """Leaves new parameters and tables of numbers unfilled, since others replace them.

    Numbers for tensors without memory would make torch import its compiler and computer algebra.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run a torch function, or hand back the tensor that an initialiser was to fill."""
        named = kwargs or {}
        if func is torch.arange and len(args) == 1 and isinstance(args[0], int) and not named:
            return torch.empty(args[0], dtype=torch.int64)
        if getattr(func, "__module__", "") == nn.init.__name__:
            return named["tensor"] if "tensor" in named else args[0]
        return func(*args, **named)


def _build(
    construct: Callable[[], Network],
    file: TensorFile,
    sources: Mapping[str, tuple[str, Callable[[Tensor], Tensor] | None]],
    *,
    number_format: NumberFormat,
) -> Network:
    """Builds a network without memory for its weights, then gives it the file's tensors, one after the other.

    sources: parameter name → (name in the file, change of layout or None).
    Tensors that are kept in the file's own format stay views of the mapped file: nothing is copied.
    """
    with torch.device("meta"), _Unfilled():
        network = construct()
    expected = network.state_dict()
    missing = [name for name in expected if name not in sources]
    if missing:
        raise ModelFileUnusable(
            f"{file.path.name!r} lacks {len(missing)} tensors of its {type(network).__name__}, first {missing[0]!r}."
        )
    state: dict[str, Tensor] = {}
    storable = storable_weights(network)
    for name, blank in expected.items():
        source, change = sources[name]
        tensor = file.read(source)
        kept_in = number_format.stored_as(tensor.dtype) if name in storable else number_format.computed
        tensor = (change(tensor) if change else tensor).to(kept_in)
        if tensor.shape != blank.shape:
            raise ModelFileUnusable(
                f"{file.path.name!r}: {source!r} has shape {tuple(tensor.shape)} "
                f"where {tuple(blank.shape)} is expected."
            )
        state[name] = tensor.contiguous()
    network.load_state_dict(state, assign=True)
    widen_in_use(network, number_format.computed)
    return network.requires_grad_(False).eval()
