"""Puts rendered art on backgrounds: the pictures every stage sees, with the name of their background colour."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.art import ArtSet

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 60, 60),
    "orange": (245, 150, 60),
    "yellow": (250, 220, 90),
    "green": (90, 180, 90),
    "blue": (80, 130, 230),
    "purple": (150, 90, 200),
    "pink": (250, 170, 200),
    "brown": (140, 95, 65),
    "black": (25, 25, 28),
    "gray": (150, 150, 150),
    "light blue": (175, 215, 250),
    "teal": (60, 170, 165),
    "beige": (240, 225, 200),
    "dark blue": (35, 45, 100),
    "light green": (190, 235, 180),
}


@dataclass(frozen=True)
class Placement:
    """How freely art is placed in the picture.

    Attributes:
        scale: smallest and largest share of the picture's shorter side.
        shift: largest shift, as a share of half the picture.
        rotation: largest rotation, radians.
        flip: mirror half of the pictures (never where text or side matters).
    """

    scale: tuple[float, float] = (0.84, 0.98)
    shift: float = 0.03
    rotation: float = 0.0
    flip: bool = False


CENTRED = Placement()
AUGMENTED = Placement(scale=(0.6, 1.0), shift=0.06, rotation=0.25, flip=True)


def background(colour: str | None, height: int, width: int, rng: random.Random) -> Tensor:
    """(3, height, width) in 0…1: the colour, plain or shaded; None is white, or nearly."""
    rows, columns = torch.linspace(-0.5, 0.5, height), torch.linspace(-0.5, 0.5, width)
    if colour is None:
        shade = rng.uniform(0, 0.05) if rng.random() < 0.3 else 0.0
        return (1 - shade * (rows + 0.5))[None, :, None].expand(3, height, width).clone()
    base = torch.tensor(COLOURS[colour]) / 255 + torch.tensor([rng.uniform(-0.04, 0.04) for _ in range(3)])
    plain = base.clamp(0, 1)[:, None, None].expand(3, height, width)
    if rng.random() < 0.6:
        return plain.clone()
    angle, depth = rng.uniform(0, 2 * math.pi), rng.uniform(-0.15, 0.15)
    ramp = math.cos(angle) * columns[None, :] + math.sin(angle) * rows[:, None]
    return (plain + depth * ramp).clamp(0, 1)


def random_colour(rng: random.Random, *, white: float = 0.5) -> str | None:
    """A background: None (white) with the given probability, else a name of COLOURS."""
    return None if rng.random() < white else rng.choice(list(COLOURS))


def place(art: Tensor, height: int, width: int, placement: Placement, rng: random.Random) -> Tensor:
    """(B, 4, height, width) premultiplied art in 0…1, from (B, 4, s, s) art in 0…1."""
    side = min(height, width)
    if side < art.shape[-1]:  # an area filter first, or the bilinear one below would alias
        art = F.interpolate(art, size=(side, side), mode="area")
    matrices = torch.zeros(len(art), 2, 3)
    for matrix in matrices:
        zoom, angle = 1 / rng.uniform(*placement.scale), rng.uniform(-placement.rotation, placement.rotation)
        mirror = -1 if placement.flip and rng.random() < 0.5 else 1
        cosine, sine = zoom * math.cos(angle), zoom * math.sin(angle)
        shifts = [zoom * rng.uniform(-placement.shift, placement.shift) for _ in range(2)]
        across, down = width / side, height / side
        matrix[0] = torch.tensor([cosine * mirror * across, -sine * mirror * down, shifts[0]])
        matrix[1] = torch.tensor([sine * across, cosine * down, shifts[1]])
    grid = F.affine_grid(matrices, [len(art), 4, height, width], align_corners=False)
    return F.grid_sample(art, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def compose(
    art: ArtSet,
    pictures: Sequence[int],
    colours: Sequence[str | None],
    *,
    rng: random.Random,
    height: int = 128,
    width: int = 128,
    placement: Placement = CENTRED,
) -> Tensor:
    """(B, 3, height, width) pixels in −1…1 of these pictures of the art set on these backgrounds."""
    stack = torch.stack([torch.from_numpy(art.pixels[i].copy()) for i in pictures])
    placed = place(stack.permute(0, 3, 1, 2).float() / 255, height, width, placement, rng)
    behind = torch.stack([background(colour, height, width, rng) for colour in colours])
    return (placed[:, :3] + behind * (1 - placed[:, 3:])).clamp(0, 1) * 2 - 1
