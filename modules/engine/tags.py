"""Names what a picture shows: ImageNet's thousand classes, with wider words where the net wavers between kinds."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from modules.engine.onnx_models import OnnxModel, pixels_of

SIDE_PX = 224
# Ranges of class numbers that share a word, last one included; the classes are in the order of their synsets.
WIDER_WORDS: tuple[tuple[str, int, int], ...] = (
    ("shark", 2, 4), ("bird", 7, 24), ("lizard", 38, 48), ("snake", 52, 68), ("spider", 72, 77),
    ("bird", 80, 100), ("crab", 118, 121), ("water bird", 127, 146), ("whale", 147, 148), ("dog", 151, 268),
    ("wolf", 269, 272), ("fox", 277, 280), ("cat", 281, 285), ("big cat", 286, 293), ("bear", 294, 297),
    ("beetle", 300, 307), ("butterfly", 321, 326), ("rabbit", 330, 332), ("monkey", 369, 382),
    ("fish", 389, 397),
)  # fmt: skip


@dataclass(frozen=True)
class Tag:
    """A word for what a picture shows, with the probability the network gives it."""

    name: str
    probability: float


class Tagger:
    """EfficientNet-Lite0 over ImageNet (Tan and Le 2019, arXiv:1905.11946, in its variant without SE blocks)."""

    def __init__(self, folder: Path) -> None:
        """Load the network and the class names of a folder.

        Raises:
            ModelFileMissing, ModelFileUnusable: see `OnnxModel`.
        """
        self._network = OnnxModel(folder / "efficientnet_lite0.onnx")
        self.names = (folder / "imagenet_classes.txt").read_text("utf-8").splitlines()

    def __call__(self, image: Image.Image) -> tuple[Tag, ...]:
        """Tags of an RGB picture with a probability of at least 0.1, the likeliest first."""
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        centre = image.crop((left, top, left + side, top + side))
        return tags_of((self._probabilities(centre) + self._probabilities(image)) / 2, self.names)

    def _probabilities(self, image: Image.Image) -> NDArray[np.float64]:
        pixels = pixels_of(image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC))
        (logits,) = self._network(((pixels - 127) / 128).transpose(2, 0, 1)[None])
        powers = np.exp(logits[0] - logits.max())
        total: NDArray[np.float64] = powers / powers.sum()
        return total


def tags_of(probabilities: NDArray[np.float64], names: Sequence[str], least: float = 0.1) -> tuple[Tag, ...]:
    """The likely classes, at most three.

    Where no class of a range of `WIDER_WORDS` reaches one half but the range does, its word stands for them.
    """
    left = probabilities.copy()
    found = []
    for word, first, last in WIDER_WORDS:
        kinds = left[first : last + 1]
        if kinds.max() < 0.5 <= kinds.sum():
            found.append(Tag(word, float(kinds.sum())))
            kinds[:] = 0
    found += [Tag(names[index], float(left[index])) for index in np.argsort(-left, kind="stable")[:3]]
    likely = [tag for tag in found if tag.probability >= least]
    return tuple(sorted(likely, key=lambda tag: -tag.probability)[:3])
