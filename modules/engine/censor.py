"""Tells unsafe pictures from safe ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from modules.engine.onnx_models import OnnxModel, pixels_of

SIDE_PX = 224
UNSAFE_FROM = 0.5  # probability of the unsafe classes together


@dataclass(frozen=True)
class NsfwScores:
    """Probabilities of the five classes of a picture; their sum is 1."""

    drawing: float
    hentai: float
    neutral: float
    porn: float
    sexy: float

    @property
    def unsafe(self) -> float:
        """Probability that the picture is pornographic, drawn or not; a suggestive picture is not."""
        return self.hentai + self.porn

    @property
    def drawn(self) -> float:
        """Probability that the picture is drawn, safe or not."""
        return self.drawing + self.hentai


class SafetyCheck(Protocol):
    """Anything that finds the unsafe ones among pictures."""

    def find_unsafe(self, images: Sequence[Image.Image]) -> list[bool]:
        """One answer per RGB picture: True for an unsafe one."""
        ...


class NsfwClassifier:
    """The MobileNetV2 of nsfwjs, trained on photographs and drawings (Sandler et al. 2018, arXiv:1801.04381)."""

    def __init__(self, folder: Path) -> None:
        """Load the network of a folder.

        Raises:
            ModelFileMissing, ModelFileUnusable: see `OnnxModel`.
        """
        self._network = OnnxModel(folder / "nsfw_mobilenet_v2.onnx")

    def __call__(self, image: Image.Image) -> NsfwScores:
        """The scores of an RGB picture, squeezed into a square as the network was trained."""
        pixels = pixels_of(image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR)) / 255
        (scores,) = self._network(pixels[None])
        return NsfwScores(*(float(score) for score in scores[0]))

    def find_unsafe(self, images: Sequence[Image.Image]) -> list[bool]:
        """See `SafetyCheck`."""
        return [self(image).unsafe >= UNSAFE_FROM for image in images]


def blacked_out(image: Image.Image) -> Image.Image:
    """A black picture of the same size."""
    return Image.new("RGB", image.size)
