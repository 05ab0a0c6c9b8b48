"""Names what a drawing shows: the thousand things the embedded model draws, looked up by its image tower."""

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modules.engine.image_tower import image_embeds, new_image_tower
from modules.engine.tags import Tag
from modules.errors import ModelFileMissing, ModelFileUnusable
from modules.loads import loading

PLAIN_SHARE = 0.75  # of the border, that is to have one colour
SAME_COLOUR = 24  # largest difference of a channel, of 255
TOWER_FILE = "focale-vision.safetensors"
BANK_FILE = "focale-describe.safetensors"


class Bank:
    """Labels, each with the embedding of pictures that show it.

    Attributes:
        rows: (labels, 192) float32, of unit length.
        labels: their names.
        scale: factor of the cosines in the softmax that gives probabilities.
    """

    def __init__(self, rows: Tensor, labels: list[str], scale: float) -> None:
        self.rows, self.labels, self.scale = rows, labels, scale

    @classmethod
    def load(cls, file: Path) -> "Bank":
        """The bank that `save` wrote."""
        with safe_open(file, "pt") as tensors:
            facts = tensors.metadata()
            return cls(tensors.get_tensor("embeddings").float(), json.loads(facts["labels"]), float(facts["scale"]))

    def save(self, file: Path) -> None:
        """Write the rows as float16; labels, as a JSON list, and scale go into the header."""
        facts = {"labels": json.dumps(self.labels), "scale": f"{self.scale:.4f}"}
        save_file({"embeddings": self.rows.half().contiguous()}, file, metadata=facts)

    def guesses(self, embeds: Tensor, count: int = 5) -> list[list[Tag]]:
        """The likeliest labels of each of (B, 192) embeddings of unit length, the first one first."""
        shares = (self.scale * embeds @ self.rows.T).softmax(-1)
        best = shares.topk(min(count, len(self.labels)))
        return [
            [Tag(self.labels[place], share) for place, share in zip(places, likely, strict=True)]
            for places, likely in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


def seen_both_ways(tower: nn.Module, pixels: Tensor) -> Tensor:
    """(B, 192) embeddings of unit length of (B, 3, h, w) pixels in −1…1, each the mean of a picture and its mirror."""
    return F.normalize(image_embeds(tower, pixels) + image_embeds(tower, pixels.flip(-1)), dim=-1)


class ConceptFinder:
    """The image tower with the bank it was trained with.

    Attributes:
        tower: what `new_image_tower` makes, in evaluation mode, with the weights of the file.
        bank: its bank.
    """

    def __init__(self, folder: Path) -> None:
        """Load both files of a folder.

        Raises:
            ModelFileMissing, ModelFileUnusable: a file is not there, or damaged.
        """
        for name in (TOWER_FILE, BANK_FILE):
            if not (folder / name).is_file():
                raise ModelFileMissing(f"{name!r} is not in {folder}. It comes with the program: fetch it again.")
        self.tower = new_image_tower().eval().requires_grad_(False)
        try:
            with loading("tool", TOWER_FILE):
                self.tower.load_state_dict(load_file(folder / TOWER_FILE))
                self.bank = Bank.load(folder / BANK_FILE)
        except (SafetensorError, OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
            raise ModelFileUnusable(
                f"{TOWER_FILE!r} or {BANK_FILE!r} in {folder} cannot be read. They come with the program: fetch them "
                f"again. ({str(error).splitlines()[0]})"
            ) from error

    @torch.inference_mode()
    def __call__(self, image: Image.Image, count: int = 5) -> list[Tag]:
        """The likeliest concepts of an RGB picture, the first one first; their probabilities sum to at most 1."""
        pixels = torch.from_numpy(np.asarray(squared(image), dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        return self.bank.guesses(seen_both_ways(self.tower, pixels), count)[0]


def is_on_plain_ground(image: Image.Image) -> bool:
    """Whether nearly the whole border of an RGB picture has one colour, as round a single thing."""
    border = _border(image)
    differences = np.abs(border - np.median(border, axis=0)).max(-1)
    return bool((differences <= SAME_COLOUR).mean() >= PLAIN_SHARE)


def squared(image: Image.Image) -> Image.Image:
    """An RGB picture with margins in its border's colour that make it a square."""
    side = max(image.size)
    colour = tuple(int(value) for value in np.median(_border(image), axis=0))
    return ImageOps.pad(image, (side, side), color=colour)


def _border(image: Image.Image) -> NDArray[np.int16]:
    """(pixels, 3) colours of the outermost pixels."""
    pixels = np.asarray(image, dtype=np.int16)
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
