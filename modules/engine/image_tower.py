"""Turns pictures into the embeddings of the embedded model's texts: CLIP's image tower on a convolutional stem.

Early convolutions: Xiao et al. 2021 (arXiv:2106.14881). Cutting a picture into patches straight away takes far more
pictures to learn from than there are of this kind of art.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

SIDE_PX = 96
PATCH_PX = 16
WIDTHS = (32, 64, 128, 256)
EMBEDDING_WIDTH = 192
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own normalisation
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut: (B, C, h, w) to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Add what the layers make of the pixels."""
        shortcut: Tensor = pixels + self.layers(pixels)
        return shortcut


class ConvolutionalStem(nn.Module):
    """Patch embeddings made by convolutions: (B, 3, h, w) to (B, 256, h / 16, w / 16)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTHS[0], 5, stride=2, padding=2)]
        for width, wider in pairwise(WIDTHS):
            layers += [nn.GroupNorm(8, width), nn.GELU(), nn.Conv2d(width, wider, 3, stride=2, padding=1)]
            layers += [ResidualBlock(wider)]
        self.layers = nn.Sequential(*layers)

    @property
    def weight(self) -> Tensor:
        """Weight of the first convolution, where CLIP's code looks up the number format."""
        weight = self.layers[0].weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed the patches."""
        embedded: Tensor = self.layers(pixels.contiguous(memory_format=torch.channels_last))
        return embedded


def new_image_tower() -> nn.Module:
    """A `CLIPVisionModelWithProjection` with fresh weights: 96 px, 6×6 patches, 3.6 M parameters."""
    tower = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=WIDTHS[-1],
            intermediate_size=4 * WIDTHS[-1],
            projection_dim=EMBEDDING_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=8,
            image_size=SIDE_PX,
            patch_size=PATCH_PX,
            hidden_act="gelu",
        )
    )
    tower.set_attn_implementation("eager")  # the fused backward pass is slow on CPUs
    tower.vision_model.embeddings.patch_embedding = ConvolutionalStem()
    return tower


def image_embeds(tower: nn.Module, pixels: Tensor) -> Tensor:
    """(B, 192) float32 embeddings of unit length, from (B, 3, h, w) pixels in −1…1 of any size."""
    if pixels.shape[-2:] != (SIDE_PX, SIDE_PX):
        pixels = F.interpolate(pixels, size=(SIDE_PX, SIDE_PX), mode="area")
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    values = (((pixels + 1) / 2 - mean) / deviation).to(next(tower.parameters()).dtype)
    return F.normalize(tower(pixel_values=values).image_embeds.float(), dim=-1)
