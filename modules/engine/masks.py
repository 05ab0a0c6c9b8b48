"""Finds the part of a picture that a mask model selects: 255 where selected, 0 elsewhere, soft at edges."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from modules.choices import ClothCategory, MaskModel
from modules.engine.onnx_models import Floats, OnnxModel, pixels_of

Colour = tuple[float, float, float]
IMAGENET: tuple[Colour, Colour] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLOTH_CLASSES = {ClothCategory.UPPER: 1, ClothCategory.LOWER: 2, ClothCategory.FULL: 3}  # 0 is no cloth
PERSON_SIDE_PX = 256


@dataclass(frozen=True)
class Preparation:
    """How a network of the U²-Net family wants its input.

    side_px: of the square the picture is squeezed into. mean, std: of the channels in 0…1 after division by the
    largest value.
    """

    side_px: int
    mean: Colour
    std: Colour


# As published with each file; Qin et al. 2020 (arXiv:2005.09007) and 2022 (arXiv:2203.03041).
PREPARATIONS: Mapping[MaskModel, Preparation] = {
    MaskModel.U2NET: Preparation(320, *IMAGENET),
    MaskModel.U2NETP: Preparation(320, *IMAGENET),
    MaskModel.U2NET_HUMAN_SEG: Preparation(320, *IMAGENET),
    MaskModel.SILUETA: Preparation(320, *IMAGENET),
    MaskModel.U2NET_CLOTH_SEG: Preparation(768, *IMAGENET),
    MaskModel.ISNET_GENERAL_USE: Preparation(1024, (0.5, 0.5, 0.5), (1.0, 1.0, 1.0)),
    MaskModel.ISNET_ANIME: Preparation(1024, IMAGENET[0], (1.0, 1.0, 1.0)),
}


def salient_mask(network: OnnxModel, preparation: Preparation, image: Image.Image) -> Image.Image:
    """The mask of what stands out in an RGB picture: `L`, same size, stretched to the full range 0…255.

    Raises:
        ModelFileUnusable: the network is of another kind.
    """
    scores = _run(network, preparation, image)[0, 0]
    low, high = float(scores.min()), float(scores.max())
    stretched = (scores - low) / (high - low) if high > low else np.zeros_like(scores)
    return _enlarged(stretched, image.size)


def cloth_mask(
    network: OnnxModel, preparation: Preparation, image: Image.Image, category: ClothCategory
) -> Image.Image:
    """The mask of one category of clothes in an RGB picture: `L`, same size.

    `full` is clothing that covers both halves of the body, such as a dress.

    Raises:
        ModelFileUnusable: the network is of another kind.
    """
    kinds = np.argmax(_run(network, preparation, image)[0], axis=0)
    return _enlarged((kinds == CLOTH_CLASSES[category]).astype(np.float64), image.size)


def person_mask(network: OnnxModel, image: Image.Image) -> Image.Image:
    """The mask of the people in an RGB picture, by MediaPipe's selfie segmentation: `L`, same size."""
    small = image.resize((PERSON_SIDE_PX, PERSON_SIDE_PX), Image.Resampling.BILINEAR)
    (probabilities,) = network(pixels_of(small)[None] / 255)
    return _enlarged(probabilities[0, 0], image.size)


def grown(mask: Image.Image, by_px: int) -> Image.Image:
    """A grey mask with its white parts grown by some pixels on each side, or shrunk for a negative number."""
    if not by_px:
        return mask
    from scipy import ndimage  # an eighth of a second, which every start of a worker would take

    spread = ndimage.maximum_filter if by_px > 0 else ndimage.minimum_filter
    return Image.fromarray(spread(np.asarray(mask), size=2 * abs(by_px) + 1, mode="nearest"))


def _run(network: OnnxModel, preparation: Preparation, image: Image.Image) -> Floats:
    """The first output of a network, (1, classes, side, side)."""
    side = preparation.side_px
    pixels = pixels_of(image.resize((side, side), Image.Resampling.LANCZOS))
    scaled = pixels / max(float(pixels.max()), 1e-6)
    normalised = (scaled - np.array(preparation.mean)) / np.array(preparation.std)
    return network(normalised.transpose(2, 0, 1)[None], network.outputs[0])[0]


def _enlarged(mask: Floats, size: tuple[int, int]) -> Image.Image:
    """A mask of 0…1 as a grey picture of another size; cut to bytes and enlarged as rembg does."""
    return Image.fromarray((mask * 255).astype(np.uint8)).resize(size, Image.Resampling.LANCZOS)
