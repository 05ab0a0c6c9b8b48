"""The tools that are no task: words for a picture, a mask of a picture, unsafe pictures. Runs in the worker process."""

import hashlib
import io
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from modules.choices import ClothCategory, MaskModel, SamModel
from modules.engine.censor import NsfwClassifier, SafetyCheck
from modules.engine.concepts import ConceptFinder
from modules.engine.describe import Describer, sentence, tag_list
from modules.engine.masks import PREPARATIONS, cloth_mask, grown, person_mask, salient_mask
from modules.engine.onnx_models import OnnxModel
from modules.engine.safety_checker import SafetyChecker, find_file
from modules.errors import EngineFailed, InvalidRequest, ModelFileMissing, NotSupportedYet, UnreadableImage
from modules.files_atomic import write_atomically
from modules.images import read_image
from modules.loads import loading
from modules.paths import Paths
from modules.settings import ROOT

logger = logging.getLogger(__name__)

SHIPPED = ROOT / "models" / "tools"
IMAGE_TOWER = ROOT / "models" / "embedded" / "clip_vision"
SAM_FILES = {
    SamModel.VIT_B: "sam_vit_b_01ec64.pth",
    SamModel.VIT_L: "sam_vit_l_0b3195.pth",
    SamModel.VIT_H: "sam_vit_h_4b8939.pth",
}
DETECTOR_FILE = "groundingdino_swint_ogc.pth"
SIZES = {  # of the files a user may bring, for the sentence that says one is missing
    MaskModel.SILUETA: "44 MB",
    MaskModel.ISNET_ANIME: "176 MB",
    MaskModel.ISNET_GENERAL_USE: "179 MB",
}
# Fooocus' captioners for photographs and for drawings.
CAPTIONERS = {"blip": "model_base_caption_capfilt_large.pth", "wd14": "wd-v1-4-moat-tagger-v2.onnx"}

Choice = TypeVar("Choice", MaskModel, ClothCategory, SamModel)


class Toolbox:
    """The tools with their networks, each loaded when it is first needed and kept."""

    def __init__(self, paths: Paths, shipped: Path = SHIPPED) -> None:
        """Loads nothing yet.

        Args:
            shipped: folder of the small networks that come with the program.
        """
        self._paths = paths
        self._shipped = shipped
        self._mask_models: dict[Path, OnnxModel] = {}

    def run(self, tool: str, payload: Mapping[str, Any]) -> str:
        """Run "describe" or "generate_mask"; see these methods for the payloads.

        Raises:
            EngineFailed: there is no such tool.
        """
        if tool == "describe":
            return self.describe(payload)
        if tool == "generate_mask":
            return str(self.generate_mask(payload))
        raise EngineFailed(f"This version has no tool called {tool!r}.")

    def describe(self, payload: Mapping[str, Any]) -> str:
        """Words for the picture at `image_path`, for each of `kinds` ("Photo", "Anime"), joined by commas.

        Raises:
            UnreadableImage: the picture cannot be read.
            InvalidRequest: a kind is unknown.
            ModelFileMissing, NotSupportedYet: a kind names a network of the user's.
        """
        kinds = list(dict.fromkeys(payload.get("kinds") or ["Photo"]))
        for kind in kinds:
            self._check_kind(str(kind))
        scene = self._describer(_picture(payload))
        words = {"Photo": sentence, "Anime": tag_list}
        return ", ".join(words[kind](scene) for kind in sorted(kinds, reverse=True))

    def generate_mask(self, payload: Mapping[str, Any]) -> Path:
        """A PNG below the temporary folder, as large as the picture at `image_path`; white is selected.

        Keys besides: `mask_model`, `cloth_category`, `sam_model`, and `erode_or_dilate` in pixels.

        Raises:
            UnreadableImage: the picture cannot be read.
            InvalidRequest: the mask model or the category is unknown.
            ModelFileMissing, ModelFileUnusable: the file of a mask model is not there or damaged.
            NotSupportedYet: the model is SAM, and its files are there.
        """
        model = _choice(MaskModel, payload, "mask_model", MaskModel.ISNET_GENERAL_USE)
        category = _choice(ClothCategory, payload, "cloth_category", ClothCategory.FULL)
        if model is MaskModel.SAM:
            self._refuse_sam(_choice(SamModel, payload, "sam_model", SamModel.VIT_B))
        network, is_person = self._mask_network(model)
        picture = _picture(payload)
        if is_person:
            mask = person_mask(network, picture)
        elif model is MaskModel.U2NET_CLOTH_SEG:
            mask = cloth_mask(network, PREPARATIONS[model], picture, category)
        else:
            mask = salient_mask(network, PREPARATIONS[model], picture)
        return self._written(grown(mask, int(payload.get("erode_or_dilate", 0))))

    def find_unsafe(self, images: Sequence[Image.Image]) -> list[bool]:
        """One answer per RGB picture: True for an unsafe one.

        Asks the safety checker of Stable Diffusion if the user has its file, else the classifier that ships.

        Raises:
            ModelFileUnusable: the file of the checker is damaged.
        """
        return self._safety_check.find_unsafe(images)

    def forget(self) -> None:
        """Free the memory that the networks take."""
        self._mask_models.clear()
        for name in ("_classifier", "_describer", "_safety_check"):
            self.__dict__.pop(name, None)

    @cached_property
    def _classifier(self) -> NsfwClassifier:
        return NsfwClassifier(self._shipped)

    @cached_property
    def _describer(self) -> Describer:
        return Describer(self._shipped, self._classifier, ConceptFinder(IMAGE_TOWER))

    @cached_property
    def _safety_check(self) -> SafetyCheck:
        path = find_file(self._paths.safety_checker)
        if path is None:
            return self._classifier
        logger.info("Pictures are checked by %s", path.name)
        with loading("tool", path.name):
            return SafetyChecker(path)

    def _mask_network(self, model: MaskModel) -> tuple[OnnxModel, bool]:
        """The network of a mask model, and whether it is the person network that stands in for the user's."""
        own, shipped = (folder / f"{model.value}.onnx" for folder in (self._paths.inpaint, self._shipped))
        person = self._shipped / "selfie_segmentation.onnx"
        found = [path for path in (own, shipped) if path.is_file()]
        if not found and model is not MaskModel.U2NET_HUMAN_SEG:
            size = SIZES.get(model, "176 MB")
            raise ModelFileMissing(
                f"{own.name!r} ({size}) is not in {own.parent}. Put it there, or choose u2netp or u2net_human_seg, "
                "which need no file."
            )
        path = found[0] if found else person
        if path not in self._mask_models:
            self._mask_models[path] = OnnxModel(path)
        return self._mask_models[path], path == person

    def _refuse_sam(self, size: SamModel) -> None:
        """Say which file is missing, or that this version cannot use it."""
        for path in (self._paths.sam / SAM_FILES[size], self._paths.inpaint / DETECTOR_FILE):
            if not path.is_file():
                raise ModelFileMissing(
                    f"{path.name!r} is not in {path.parent}. Without it choose another mask_model, such as u2netp."
                )
        raise NotSupportedYet(
            "mask_model", "This version cannot use SAM yet. Choose another model, such as u2netp.", "sam"
        )

    def _check_kind(self, kind: str) -> None:
        """Refuse what is not "Photo" or "Anime"."""
        if kind in ("Photo", "Anime"):
            return
        name = CAPTIONERS.get(kind.casefold())
        if name is None:
            raise InvalidRequest("image_type", "must be Photo or Anime", kind)
        if not (self._paths.clip_vision / name).is_file():
            raise ModelFileMissing(f"{name!r} is not in {self._paths.clip_vision}. Choose Photo or Anime.")
        raise NotSupportedYet("image_type", f"This version cannot use {kind} yet. Choose Photo or Anime.", kind)

    def _written(self, mask: Image.Image) -> Path:
        """The file of a mask, named by its content, so that the same mask is stored once."""
        buffer = io.BytesIO()
        mask.save(buffer, "PNG")
        path = self._paths.temp / "masks" / f"{hashlib.sha256(buffer.getvalue()).hexdigest()[:32]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue(), durable=False)
        return path


def _picture(payload: Mapping[str, Any]) -> Image.Image:
    """The RGB picture at `image_path`."""
    picture = read_image(Path(str(payload["image_path"])), field="image")
    if picture is None:
        raise UnreadableImage("image", "A picture is required.", None)
    return picture


def _choice(kind: type[Choice], payload: Mapping[str, Any], key: str, default: Choice) -> Choice:
    """The value of a key as one of the choices."""
    try:
        return kind(payload.get(key, default))
    except ValueError:
        raise InvalidRequest(
            key, f"must be one of {', '.join(choice.value for choice in kind)}", payload[key]
        ) from None
