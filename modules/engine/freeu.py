"""FreeU version 2: stronger backbone features and weaker low frequencies in the skip connections."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


class FreeUFactors(Protocol):
    """The four factors; 1 changes nothing.

    b1, b2: on backbone features of the network's largest and of its second largest width, 0 to 2; of
        Stable Diffusion's networks these are 4 and 2 times the first width.
    s1, s2: on the low frequencies of the skip connections that meet them, 0 to 4.
    """

    @property
    def b1(self) -> float: ...
    @property
    def b2(self) -> float: ...
    @property
    def s1(self) -> float: ...
    @property
    def s2(self) -> float: ...


@dataclass(frozen=True)
class _Splice:
    """Pre-hook of a resnet of the up path, whose input is backbone and skip features side by side.

    width: channels of the backbone features.
    """

    width: int
    backbone: float
    skip: float

    def __call__(self, _resnet: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        features: Tensor = args[0]
        backbone, skip = features[:, : self.width], features[:, self.width :]
        joined = torch.cat([strengthened(backbone, self.backbone), without_low_frequencies(skip, self.skip)], dim=1)
        return (joined, *args[1:])


@contextmanager
def freeu(unet: UNet2DConditionModel, factors: FreeUFactors) -> Iterator[None]:
    """Apply FreeU to a UNet inside the `with` block; outside it is exactly as before.

    Si et al. 2023 (arXiv:2309.11497), in the authors' second version, which weighs each place by how much
    it stands out.

    Args:
        unet: a `UNet2DConditionModel`; it finds the layers by their widths, of any size.
        factors: factors of 1 leave their part of the network untouched.
    """
    by_width = dict(zip(_two_widest(unet), ((factors.b1, factors.s1), (factors.b2, factors.s2)), strict=False))
    hooks = []
    try:
        for resnet, width in _up_resnets(unet):
            backbone, skip = by_width.get(width, (1.0, 1.0))
            if backbone != 1.0 or skip != 1.0:
                hooks.append(resnet.register_forward_pre_hook(_Splice(width, backbone, skip)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def strengthened(backbone: Tensor, factor: float) -> Tensor:
    """The first half of the channels times (b - 1)·m + 1; m is the channels' mean, brought to 0…1 per image.

    Args:
        backbone: (B, C, h, w).
        factor: b; 1 gives the input itself.
    """
    if factor == 1.0:
        return backbone
    mean = backbone.mean(dim=1, keepdim=True)
    low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
    # Constant features stand out nowhere; 0/0 would spread over the whole picture.
    weight = (mean - low) / (high - low).clamp(min=torch.finfo(mean.dtype).tiny)
    half = backbone.shape[1] // 2
    return torch.cat([backbone[:, :half] * ((factor - 1) * weight + 1), backbone[:, half:]], dim=1)


def without_low_frequencies(skip: Tensor, factor: float) -> Tensor:
    """Skip features with the central 2×2 bins of their spectrum times `factor`, real part.

    The bins are the frequencies 0 and -1 of rows and columns. Only these are transformed, in float32.

    Args:
        skip: (B, C, h, w).
        factor: s; 1 gives the input itself.
    """
    height, width = skip.shape[-2:]
    if factor == 1.0:
        return skip
    basis = _low_frequencies(height, width, skip.device)
    flat = skip.float().flatten(2)
    low = (flat @ basis.t()) @ basis
    return torch.add(flat, low, alpha=factor - 1).view(skip.shape).to(skip.dtype)


@cache
def _low_frequencies(height: int, width: int, device: torch.device) -> Tensor:
    """(7, h·w): cosines and sines of the four lowest bins, scaled so that Bᵀ·B transforms there and back.

    The real part of X_k·e^{iφ} summed over a bin is the projection on its cosine and sine.
    """
    rows = torch.arange(height, dtype=torch.float64)[:, None] / height
    columns = torch.arange(width, dtype=torch.float64)[None, :] / width
    waves = []
    for row_bin in (0, -1)[:height]:
        for column_bin in (0, -1)[:width]:
            phase = 2 * math.pi * (row_bin * rows + column_bin * columns)
            waves += [phase.cos()] if row_bin == column_bin == 0 else [phase.cos(), phase.sin()]
    return (torch.stack(waves).flatten(1) / math.sqrt(height * width)).float().to(device)


def _two_widest(unet: UNet2DConditionModel) -> list[int]:
    return sorted(set(unet.config["block_out_channels"]), reverse=True)[:2]


def _up_resnets(unet: UNet2DConditionModel) -> Iterator[tuple[nn.Module, int]]:
    """Resnets of the up path with the width of the backbone features that enter each."""
    blocks: Iterable[Any] = unet.up_blocks
    width = unet.config["block_out_channels"][-1]
    for block in blocks:
        for resnet in block.resnets:
            yield resnet, width
            width = resnet.out_channels
