"""Names the colours, the light and the format of a picture."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SAMPLE_SIDE_PX = 64
LEAST_SHARE = 0.12  # of the picture, for a colour to be named
MOST_COLOURS = 3
GREY_CHROMA = 8.0  # distance from grey in CIELAB below which a pixel has no hue

# Typical sRGB values of the basic colour words; a pixel is called what it is nearest to in CIELAB.
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "black": (12, 12, 12), "grey": (128, 128, 128), "white": (245, 245, 245),
    "red": (200, 30, 35), "dark red": (100, 15, 20), "orange": (240, 130, 30), "brown": (110, 70, 40),
    "beige": (220, 200, 165), "yellow": (245, 220, 50), "green": (60, 150, 60), "dark green": (25, 65, 30),
    "teal": (20, 130, 130), "light blue": (150, 200, 235), "blue": (40, 90, 200), "dark blue": (20, 30, 80),
    "purple": (120, 50, 150), "pink": (245, 150, 180),
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What a picture looks like, whatever it shows.

    colours: names of up to three colours, the most frequent first; none for a picture in greys.
    light: "dark", "bright" or "" in between.
    format: "portrait", "landscape" or "square".
    """

    colours: tuple[str, ...]
    light: str
    format: str
    is_grey: bool


def look_of(image: Image.Image) -> Look:
    """The look of an RGB picture."""
    small = image.resize((SAMPLE_SIDE_PX, SAMPLE_SIDE_PX), Image.Resampling.BOX)
    lab = cielab(np.asarray(small, np.float64).reshape(-1, 3))
    lightness = lab[:, 0].mean()
    is_grey = bool((np.hypot(lab[:, 1], lab[:, 2]) < GREY_CHROMA).mean() > 0.98)
    width, height = image.size
    return Look(
        colours=() if is_grey else _names(lab),
        light="dark" if lightness < 30 else "bright" if lightness > 70 else "",
        format="landscape" if width > 1.1 * height else "portrait" if height > 1.1 * width else "square",
        is_grey=is_grey,
    )


def _names(lab: NDArray[np.float64]) -> tuple[str, ...]:
    """The colours that cover at least `LEAST_SHARE`, or the most frequent one."""
    known = cielab(np.array(list(COLOURS.values()), np.float64))
    nearest = np.argmin(((lab[:, None] - known[None]) ** 2).sum(-1), axis=1)
    shares = np.bincount(nearest, minlength=len(COLOURS)) / len(lab)
    order = np.argsort(-shares, kind="stable")[:MOST_COLOURS]
    names = list(COLOURS)
    return tuple(names[index] for rank, index in enumerate(order) if not rank or shares[index] >= LEAST_SHARE)


def cielab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIELAB under D65 of sRGB values 0…255, (n, 3) each (IEC 61966-2-1; CIE 15)."""
    linear = np.where(rgb <= 0.04045 * 255, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ matrix.T / matrix.sum(axis=1)
    bent = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = bent.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)
