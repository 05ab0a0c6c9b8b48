"""Finds faces: where they are, and where their eyes, noses and mouths are."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from modules.engine.onnx_models import Floats, OnnxModel, pixels_of

LONGEST_SIDE_PX = 640  # faces smaller than 20 px in a picture of this size are not looked for
SMALLEST_FACE_PX = 20
PYRAMID_FACTOR = 0.709  # the areas of neighbouring levels differ by 2
PROPOSAL_SCORE, REFINED_SCORE, FACE_SCORE = 0.6, 0.7, 0.9
CELL_PX, STRIDE_PX = 12, 2  # field of view and step of the proposal network


@dataclass(frozen=True)
class Face:
    """A face in a picture.

    box: left, top, right, bottom in pixels of the picture, not cut at its edges.
    score: 0.9 to 1.
    landmarks: (x, y) of the eye at the left of the picture, the other eye, the nose, the left and right corner
        of the mouth.
    """

    box: tuple[float, float, float, float]
    score: float
    landmarks: tuple[tuple[float, float], ...]

    @property
    def height(self) -> float:
        """Height of the box in pixels."""
        return self.box[3] - self.box[1]


class FaceFinder:
    """MTCNN: proposals over a pyramid, refined, then measured (Zhang et al. 2016, arXiv:1604.02878).

    The networks were trained on transposed pictures: axis 1 of their inputs is x, axis 2 is y.
    """

    def __init__(self, folder: Path) -> None:
        """Load the three networks of a folder.

        Raises:
            ModelFileMissing, ModelFileUnusable: see `OnnxModel`.
        """
        self._propose, self._refine, self._measure = (
            OnnxModel(folder / f"mtcnn_{stage}.onnx") for stage in ("pnet", "rnet", "onet")
        )

    def __call__(self, image: Image.Image) -> tuple[Face, ...]:
        """Every face of an RGB picture, the largest first."""
        scale = min(1.0, LONGEST_SIDE_PX / max(image.size))
        small = image if scale == 1 else image.resize(_scaled(image.size, scale), Image.Resampling.BOX)
        boxes = _merged(_squares(self._proposals(small)), 0.7)
        boxes = self._refined(small, boxes)
        return tuple(sorted(self._measured(small, boxes, scale), key=lambda face: -face.height))

    def _proposals(self, image: Image.Image) -> Floats:
        """(n, 5) boxes and scores from all levels of the pyramid."""
        found = [np.empty((0, 5))]
        scale = CELL_PX / SMALLEST_FACE_PX
        while min(image.size) * scale >= CELL_PX:
            level = image.resize(_scaled(image.size, scale), Image.Resampling.BOX)
            shifts, scores = self._propose(_normalised(level)[None], "conv2d_4", "softmax")
            found.append(_merged(_cells(shifts[0], scores[0, :, :, 1], scale), 0.5))
            scale *= PYRAMID_FACTOR
        return _merged(np.concatenate(found), 0.7)

    def _refined(self, image: Image.Image, boxes: Floats) -> Floats:
        """The boxes that look like faces on a second look, corrected and square."""
        if not len(boxes):
            return boxes
        shifts, scores = self._refine(_crops(image, boxes, 24), "dense_2", "softmax_1")
        likely = scores[:, 1] >= REFINED_SCORE
        boxes = _shifted(boxes[likely], shifts[likely])
        boxes[:, 4] = scores[likely, 1]
        return _squares(_merged(boxes, 0.7))

    def _measured(self, image: Image.Image, boxes: Floats, scale: float) -> list[Face]:
        """Final boxes and landmarks, in pixels of a picture 1/scale times as large."""
        if not len(boxes):
            return []
        shifts, points, scores = self._measure(_crops(image, boxes, 48), "dense_5", "dense_6", "softmax_2")
        sides = boxes[:, 2:4] - boxes[:, :2]
        points = boxes[:, None, :2] + points.reshape(-1, 2, 5).transpose(0, 2, 1) * sides[:, None]
        boxes = _shifted(boxes, shifts)
        boxes[:, 4] = scores[:, 1]
        kept = [index for index in _kept(boxes, 0.7, of_smaller=True) if boxes[index, 4] >= FACE_SCORE]
        return [
            Face(
                box=(float(left), float(top), float(right), float(bottom)),
                score=float(boxes[index, 4]),
                landmarks=tuple((float(x), float(y)) for x, y in points[index] / scale),
            )
            for index in kept
            for left, top, right, bottom in [boxes[index, :4] / scale]
        ]


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _normalised(image: Image.Image) -> Floats:
    """(width, height, 3) in −1…1: transposed, as the networks want it."""
    return ((pixels_of(image) - 127.5) / 128).transpose(1, 0, 2)


def _cells(shifts: Floats, scores: Floats, scale: float) -> Floats:
    """(n, 5) boxes of the cells that may hold a face, corrected by what the network adds to each side."""
    x, y = np.nonzero(scores >= PROPOSAL_SCORE)
    corners = np.stack([x, y], 1) * float(STRIDE_PX)
    boxes = np.concatenate([corners, corners + CELL_PX, scores[x, y, None]], 1)
    boxes[:, :4] /= scale
    return _shifted(boxes, shifts[x, y])


def _shifted(boxes: Floats, shifts: Floats) -> Floats:
    """Boxes with each side moved by a share of the box's width or height."""
    sides = boxes[:, 2:4] - boxes[:, :2]
    moved = boxes.copy()
    moved[:, :4] += shifts * np.concatenate([sides, sides], 1)
    return moved


def _squares(boxes: Floats) -> Floats:
    """Boxes grown to squares about their centres."""
    squares = boxes.copy()
    centres = (boxes[:, :2] + boxes[:, 2:4]) / 2
    half = (boxes[:, 2:4] - boxes[:, :2]).max(axis=1, keepdims=True) / 2
    squares[:, :2], squares[:, 2:4] = centres - half, centres + half
    return squares


def _crops(image: Image.Image, boxes: Floats, side: int) -> Floats:
    """(n, side, side, 3) normalised crops; what lies outside the picture is black."""
    crops = [
        image.crop(
            (round(box[0]), round(box[1]), max(round(box[2]), round(box[0]) + 1), max(round(box[3]), round(box[1]) + 1))
        )
        for box in boxes[:, :4]
    ]
    return np.stack([_normalised(crop.resize((side, side), Image.Resampling.BOX)) for crop in crops])


def _merged(boxes: Floats, most: float) -> Floats:
    return boxes[_kept(boxes, most)]


def _kept(boxes: Floats, most: float, *, of_smaller: bool = False) -> list[int]:
    """Indices that are left when every box covered too much by one with a better score is dropped.

    Args:
        most: largest overlap kept, as a share of the union of the two, or of the smaller one.
    """
    order = list(np.argsort(-boxes[:, 4], kind="stable"))
    areas = np.prod(boxes[:, 2:4] - boxes[:, :2], axis=1)
    kept = []
    while order:
        best, rest = order[0], np.array(order[1:], dtype=np.intp)
        kept.append(int(best))
        overlap = np.minimum(boxes[best, 2:4], boxes[rest, 2:4]) - np.maximum(boxes[best, :2], boxes[rest, :2])
        shared = np.prod(np.clip(overlap, 0, None), axis=1)
        whole = np.minimum(areas[best], areas[rest]) if of_smaller else areas[best] + areas[rest] - shared
        order = list(rest[shared <= most * whole])
    return kept
