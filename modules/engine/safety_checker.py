"""Stable Diffusion's own safety checker: finds the pictures that lie near its unsafe concepts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModel

from modules.engine.image_tower import DEVIATION, MEAN
from modules.engine.onnx_models import pixels_of
from modules.engine.tensorfile import open_tensor_file
from modules.errors import ModelFileUnusable

FILES = (
    "stable-diffusion-safety-checker.safetensors", "stable-diffusion-safety-checker.bin",
    "model.safetensors", "pytorch_model.bin",
)  # fmt: skip
HEAD_WIDTH = 64
SPECIAL_CARE = 0.01  # added to the scores of a picture that lies near a special concept
TOWER = "vision_model.vision_model."


def find_file(folder: Path) -> Path | None:
    """The checker's file in a folder, under the names it is published by."""
    return next((folder / name for name in FILES if (folder / name).is_file()), None)


class SafetyChecker(nn.Module):
    """A CLIP image tower, its projection, and the embeddings of 17 unsafe and 3 special concepts."""

    def __init__(self, path: Path) -> None:
        """Load a checker; all sizes come from its weights.

        Raises:
            ModelFileMissing: there is no such file.
            ModelFileUnusable: it is damaged, or no safety checker.
        """
        super().__init__()
        file = open_tensor_file(path)
        if f"{TOWER}embeddings.patch_embedding.weight" not in file.shapes or "concept_embeds" not in file.shapes:
            raise ModelFileUnusable(f"{path.name!r} is no safety checker of Stable Diffusion.")
        config = _config(file.shapes)
        self.tower = CLIPVisionModel(config)
        self._side_px = int(np.asarray(config.image_size))
        weights = {key: file.read(key).float() for key in file.shapes if not key.endswith("position_ids")}
        self._load_tower(
            {key.removeprefix(TOWER): value for key, value in weights.items() if key.startswith(TOWER)}, path
        )
        self.projection = _buffer(weights, "visual_projection.weight", path)
        self.unsafe = nn.functional.normalize(_buffer(weights, "concept_embeds", path))
        self.special = nn.functional.normalize(_buffer(weights, "special_care_embeds", path))
        self.unsafe_limits = _buffer(weights, "concept_embeds_weights", path)
        self.special_limits = _buffer(weights, "special_care_embeds_weights", path)
        self.eval()

    def _load_tower(self, weights: Mapping[str, Tensor], path: Path) -> None:
        prefix = "vision_model." if any(key.startswith("vision_model.") for key in self.tower.state_dict()) else ""
        try:
            self.tower.load_state_dict({prefix + key: value for key, value in weights.items()})
        except RuntimeError as error:
            raise ModelFileUnusable(f"{path.name!r} is no safety checker of Stable Diffusion: {error}") from error

    @torch.inference_mode()
    def find_unsafe(self, images: Sequence[Image.Image]) -> list[bool]:
        """One answer per RGB picture: True for an unsafe one."""
        return [bool(self._is_unsafe(self._embedding(image))) for image in images]

    def _embedding(self, image: Image.Image) -> Tensor:
        """(1, P) embedding of a picture, of length 1."""
        side = self._side_px
        scale = side / min(image.size)
        size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        crop = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))
        pixels = (pixels_of(crop) / 255 - np.array(MEAN)) / np.array(DEVIATION)
        pooled = self.tower(torch.from_numpy(pixels.transpose(2, 0, 1))[None].float()).pooler_output
        return nn.functional.normalize(pooled @ self.projection.T)

    def _is_unsafe(self, embedding: Tensor) -> bool:
        return near_unsafe_concept(
            (embedding @ self.unsafe.T)[0] - self.unsafe_limits, (embedding @ self.special.T)[0] - self.special_limits
        )


def near_unsafe_concept(unsafe: Tensor, special: Tensor) -> bool:
    """The checker's decision on cosines less their limits; one special concept makes it stricter.

    Compared after rounding to three decimals, as the published checker does.
    """
    extra = SPECIAL_CARE if bool((special.double().round(decimals=3) > 0).any()) else 0.0
    return bool(((unsafe.double() + extra).round(decimals=3) > 0).any())


def _buffer(weights: Mapping[str, Tensor], key: str, path: Path) -> Tensor:
    if key not in weights:
        raise ModelFileUnusable(f"{path.name!r} is no safety checker of Stable Diffusion: it has no {key!r}.")
    return weights[key]


def _config(shapes: Mapping[str, tuple[int, ...]]) -> CLIPVisionConfig:
    """The tower's sizes, read off its weights."""
    width, _, patch, _ = shapes[f"{TOWER}embeddings.patch_embedding.weight"]
    positions = shapes[f"{TOWER}embeddings.position_embedding.weight"][0]
    layers = {int(key.split(".")[4]) for key in shapes if key.startswith(f"{TOWER}encoder.layers.")}
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=shapes[f"{TOWER}encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=len(layers),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=round((positions - 1) ** 0.5) * patch,
        patch_size=patch,
        projection_dim=shapes["visual_projection.weight"][0],
    )
