"""Applies a function of pictures tile by tile, for pictures too large to be computed whole."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def tiled_passes(
    function: Callable[[Tensor], Tensor],
    tensor: Tensor,
    tiles: Sequence[tuple[int, int]],
    overlap: int,
    scale: float,
) -> Tensor:
    """Applies `function` tile by tile, one pass per tile shape, and averages the passes.

    Seams of one pass lie elsewhere than those of the next, so none of them shows.

    Args:
        function: changes the size of a tile by `scale` both ways.
        tensor: (B, C, H, W).
        tiles: (rows, columns) of the tiles of each pass.
        overlap: rows and columns that neighbouring tiles share.
    """
    total = _tiled_pass(function, tensor, tiles[0], overlap, scale)
    for tile in tiles[1:]:
        total += _tiled_pass(function, tensor, tile, overlap, scale)
    return total / len(tiles)


def _tiled_pass(
    function: Callable[[Tensor], Tensor],
    tensor: Tensor,
    tile: tuple[int, int],
    overlap: int,
    scale: float,
) -> Tensor:
    """One pass: results fade in over `overlap`·`scale` on all four sides; the sum of weights is divided out."""
    height, width = tensor.shape[-2:]
    total: Tensor | None = None
    weight = torch.zeros(1, 1, round(height * scale), round(width * scale), device=tensor.device)
    for top in range(0, height, tile[0] - overlap):
        for left in range(0, width, tile[1] - overlap):
            part = function(tensor[..., top : top + tile[0], left : left + tile[1]]).float()
            mask = _fading_mask(part, round(overlap * scale))
            if total is None:
                total = torch.zeros(*part.shape[:2], *weight.shape[2:], device=part.device)
            rows = slice(round(top * scale), round(top * scale) + part.shape[-2])
            columns = slice(round(left * scale), round(left * scale) + part.shape[-1])
            total[..., rows, columns] += part * mask
            weight[..., rows, columns] += mask
    if total is None:
        raise ValueError(f"There is nothing to cut into tiles: the tensor is {tuple(tensor.shape)}.")
    return total.div_(weight)


def _fading_mask(part: Tensor, feather: int) -> Tensor:
    """(1, 1, H, W): 1 in the middle, (k + 1) / feather in row or column k from each side."""
    ramps = []
    for length in part.shape[-2:]:
        position = torch.arange(length, device=part.device)
        rising = ((position + 1) / feather).clamp(max=1.0)
        ramps.append(rising * rising.flip(0))
    return (ramps[0][:, None] * ramps[1])[None, None]
