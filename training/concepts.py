"""The files of the image tower and of the bank that names what a drawing shows, and how both are read."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from modules.engine.tensorfile import open_tensor_file

TOWER_FILE = "focale-vision.safetensors"
BANK_FILE = "focale-describe.safetensors"
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own normalisation
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Bank:
    """What there is a name for.

    Attributes:
        embeddings: (N, width) of unit length.
        labels: N names.
        scale: factor of the cosines in the logits.
        least: cosine below which a picture shows none of these things.
    """

    embeddings: Tensor
    labels: tuple[str, ...]
    scale: float
    least: float


def read_bank(file: Path) -> Bank:
    """The bank that training wrote.

    Raises:
        ModelFileMissing, ModelFileUnusable: see `open_tensor_file`.
    """
    tensors = open_tensor_file(file)
    facts = tensors.metadata
    labels = tuple(json.loads(facts["labels"]))
    return Bank(tensors.read("embeddings").float(), labels, float(facts["scale"]), float(facts["least"]))


def read_tower(file: Path) -> CLIPVisionModelWithProjection:
    """The image tower in float32, its sizes told by the shapes; a head has 32 channels.

    Raises:
        ModelFileMissing, ModelFileUnusable: see `open_tensor_file`.
    """
    tensors = open_tensor_file(file)
    weights = {name: tensors.read(name).float() for name in tensors.shapes}
    patch = weights["vision_model.embeddings.patch_embedding.weight"]
    places = len(weights["vision_model.embeddings.position_embedding.weight"]) - 1
    config = CLIPVisionConfig(
        hidden_size=len(patch),
        intermediate_size=len(weights["vision_model.encoder.layers.0.mlp.fc1.bias"]),
        projection_dim=len(weights["visual_projection.weight"]),
        num_hidden_layers=sum(name.endswith("mlp.fc1.bias") for name in weights),
        num_attention_heads=len(patch) // 32,
        image_size=round(places**0.5) * patch.shape[-1],
        patch_size=patch.shape[-1],
        hidden_act="gelu",
    )
    tower = CLIPVisionModelWithProjection(config)
    tower.load_state_dict(weights)
    return tower.eval()


def image_embeds(tower: CLIPVisionModelWithProjection, pixels: Tensor) -> Tensor:
    """(B, width) float32 embeddings of unit length, from (B, 3, h, w) pixels in −1…1 of any size."""
    side = tower.config.image_size
    if pixels.shape[-2:] != (side, side):
        pixels = F.interpolate(pixels, size=(side, side), mode="area")
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    values = (((pixels + 1) / 2 - mean) / deviation).to(tower.dtype)
    return F.normalize(tower(pixel_values=values).image_embeds.float(), dim=-1)
