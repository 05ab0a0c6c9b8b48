"""Doubles feature maps with four small convolutions in place of one large one over repeated pixels.

Nearest-neighbour upsampling repeats each pixel in a square of four, so a 3×3 convolution after it multiplies equal
numbers several times. Summing the weights that meet the same pixel leaves one 2×2 convolution per corner of the square,
on the small map: 4 multiplications per output pixel where there were 9 (Shi et al. 2016, arXiv:1609.07009, section 2,
read backwards). The results differ by rounding only.
"""

from typing import cast

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

from modules.engine.formats import weight_in_use

# Narrower layers spend more time on four calls than they save.
MIN_CHANNELS = 128


class _FoldedUpsample2D(Upsample2D):
    """diffusers' layer, faster in float32 on a CPU; anywhere else, and for odd sizes, as it is there."""

    def forward(self, hidden_states: Tensor, output_size: int | None = None, *args: object, **kwargs: object) -> Tensor:
        if output_size is not None or hidden_states.dtype != torch.float32 or hidden_states.device.type != "cpu":
            output: Tensor = super().forward(hidden_states, output_size, *args, **kwargs)
            return output
        convolution = cast(nn.Conv2d, self.conv)
        return upsample_and_convolve(hidden_states, weight_in_use(convolution), convolution.bias)


def fold_upsampling(network: nn.Module) -> None:
    """Makes the wide upsampling layers of a UNet or VAE take the short way; their weights and names stay."""
    for module in network.modules():
        if type(module) is Upsample2D and _is_foldable(module):
            module.__class__ = _FoldedUpsample2D


def folded_layers(network: nn.Module) -> list[Upsample2D]:
    """The layers that `fold_upsampling` changed."""
    return [module for module in network.modules() if isinstance(module, _FoldedUpsample2D)]


def _is_foldable(layer: Upsample2D) -> bool:
    convolution = getattr(layer, "conv", None)
    return (
        isinstance(convolution, nn.Conv2d)
        and (convolution.kernel_size, convolution.padding, convolution.stride) == ((3, 3), (1, 1), (1, 1))
        and convolution.groups == 1
        and getattr(layer, "norm", None) is None
        and bool(layer.interpolate)
        and min(convolution.in_channels, convolution.out_channels) >= MIN_CHANNELS
    )


def upsample_and_convolve(pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(N, C, H, W) to (N, D, 2H, 2W): each pixel repeated in a square, then convolved with `weight` (D, C, 3, 3)."""
    count, _, height, width = pixels.shape
    is_channels_last = pixels.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_channels_last else torch.contiguous_format
    output = torch.empty((count, len(weight), 2 * height, 2 * width), memory_format=layout)
    for top, rows in enumerate(_folded(weight, dim=2)):
        for left, corner in enumerate(_folded(rows, dim=3)):
            # With padding on both sides the result is one row and one column larger; each corner leaves out another.
            convolved = functional.conv2d(pixels, corner.contiguous(memory_format=layout), bias, padding=1)
            output[:, :, top::2, left::2] = convolved[:, :, top : top + height, left : left + width]
    return output


def _folded(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Three taps along `dim` as two, for the first and for the second pixel of each repeated pair."""
    before, middle, after = (weight.narrow(dim, tap, 1) for tap in range(3))
    return torch.cat((before, middle + after), dim), torch.cat((before + middle, after), dim)
