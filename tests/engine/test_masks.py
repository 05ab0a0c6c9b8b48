"""Masks: what the shipped networks select, whose files count, and what is said where one is missing."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from modules.choices import ClothCategory, MaskModel
from modules.engine.masks import PREPARATIONS, cloth_mask, grown, salient_mask
from modules.errors import InvalidRequest, ModelFileMissing, ModelFileUnusable, NotSupportedYet
from modules.settings import Settings
from modules.tools import SHIPPED, Toolbox

pytestmark = pytest.mark.engine

DATA = Path(__file__).parents[1] / "data"
NEEDS_A_FILE = [
    MaskModel.U2NET, MaskModel.SILUETA, MaskModel.ISNET_GENERAL_USE, MaskModel.ISNET_ANIME, MaskModel.U2NET_CLOTH_SEG,
]  # fmt: skip


@pytest.fixture
def toolbox(settings: Settings) -> Toolbox:
    return Toolbox(settings.paths)


def mask_of(toolbox: Toolbox, picture: Path, **options: object) -> np.ndarray:
    path = toolbox.run("generate_mask", {"image_path": str(picture), **options})
    with Image.open(path) as mask, Image.open(picture) as asked:
        assert (mask.format, mask.mode, mask.size) == ("PNG", "L", asked.size)
        return np.asarray(mask)


@pytest.fixture
def ball(tmp_path: Path) -> Path:
    image = Image.new("RGB", (400, 300), (190, 205, 220))
    ImageDraw.Draw(image).ellipse((130, 80, 270, 220), (200, 40, 30))
    image.save(tmp_path / "ball.png")
    return tmp_path / "ball.png"


def test_what_stands_out_is_selected(toolbox: Toolbox, ball: Path):
    selected = mask_of(toolbox, ball, mask_model="u2netp") > 127
    y, x = np.mgrid[:300, :400]
    disc = (x - 200) ** 2 + (y - 150) ** 2 < 70**2
    assert (selected & disc).sum() / (selected | disc).sum() > 0.95


def test_the_cup_is_selected_and_the_table_is_not(toolbox: Toolbox):
    mask = mask_of(toolbox, DATA / "coffee.jpg", mask_model="u2netp")
    assert mask[70:90, 80:110].mean() > 200
    assert mask[:10, :10].mean() < 60
    assert (mask.min(), mask.max()) == (0, 255)


def test_a_person_is_selected_without_any_file_of_the_users(toolbox: Toolbox):
    mask = mask_of(toolbox, DATA / "astronaut.jpg", mask_model="u2net_human_seg")
    assert mask[50:80, 65:95].mean() > 230
    assert mask[5:40, 5:30].mean() < 40


def test_the_same_mask_is_stored_once_below_the_temporary_folder(toolbox: Toolbox, ball: Path, settings: Settings):
    payload = {"image_path": str(ball), "mask_model": "u2netp"}
    paths = {toolbox.run("generate_mask", payload) for _ in range(2)}
    assert [Path(path) for path in paths] == list((settings.paths.temp / "masks").iterdir())


@pytest.mark.parametrize("model", NEEDS_A_FILE)
def test_a_missing_file_is_named_with_its_folder(model: MaskModel, toolbox: Toolbox, ball: Path, settings: Settings):
    missing = re.escape(f"'{model.value}.onnx'") + ".*" + re.escape(str(settings.paths.inpaint)) + ".*u2netp"
    with pytest.raises(ModelFileMissing, match=missing):
        mask_of(toolbox, ball, mask_model=model.value)


def test_without_a_name_the_default_model_is_meant(toolbox: Toolbox, ball: Path):
    with pytest.raises(ModelFileMissing, match=r"isnet-general-use\.onnx"):
        mask_of(toolbox, ball)


@pytest.mark.parametrize("model", ["u2net", "u2net_human_seg"])
def test_a_file_of_the_users_is_used_as_soon_as_it_is_there(
    model: str, toolbox: Toolbox, ball: Path, settings: Settings
):
    shutil.copy(SHIPPED / "u2netp.onnx", settings.paths.inpaint / f"{model}.onnx")
    own, shipped = (mask_of(toolbox, ball, mask_model=name) for name in (model, "u2netp"))
    assert np.array_equal(own, shipped)


def test_a_file_of_another_kind_is_refused(toolbox: Toolbox, ball: Path, settings: Settings):
    shutil.copy(SHIPPED / "u2netp.onnx", settings.paths.inpaint / "isnet-anime.onnx")
    with pytest.raises(ModelFileUnusable, match=r"isnet-anime\.onnx"):
        mask_of(toolbox, ball, mask_model="isnet-anime")


def test_sam_is_refused_by_the_file_that_is_missing_and_then_as_such(toolbox: Toolbox, ball: Path, settings: Settings):
    files = (settings.paths.sam / "sam_vit_l_0b3195.pth", settings.paths.inpaint / "groundingdino_swint_ogc.pth")
    for file in files:
        with pytest.raises(ModelFileMissing, match=re.escape(f"{file.name!r} is not in {file.parent}")):
            mask_of(toolbox, ball, mask_model="sam", sam_model="vit_l")
        file.touch()
    with pytest.raises(NotSupportedYet, match="cannot use SAM yet"):
        mask_of(toolbox, ball, mask_model="sam", sam_model="vit_l")


@pytest.mark.parametrize("options", [{"mask_model": "magic"}, {"mask_model": "u2netp", "cloth_category": "hat"}])
def test_unknown_choices_are_refused_with_the_known_ones(options: dict[str, str], toolbox: Toolbox, ball: Path):
    with pytest.raises(InvalidRequest, match="must be one of"):
        mask_of(toolbox, ball, **options)


def test_masks_grow_and_shrink_by_pixels():
    dot = np.zeros((21, 21), np.uint8)
    dot[10, 10] = 255
    large = grown(Image.fromarray(dot), 3)
    assert np.argwhere(np.asarray(large)).min(0).tolist() == [7, 7]
    assert (np.asarray(large) == 255).sum() == 49
    assert np.array_equal(np.asarray(grown(large, -3)), dot)
    assert grown(large, 0) is large


def test_growing_reaches_the_file(toolbox: Toolbox, ball: Path):
    plain, large = (mask_of(toolbox, ball, mask_model="u2netp", erode_or_dilate=px) for px in (0, 8))
    assert np.array_equal(large, np.asarray(grown(Image.fromarray(plain), 8)))
    assert (large > 127).sum() > (plain > 127).sum()


class Canned:
    """Stands for a network: keeps what it is given and answers with fixed scores."""

    outputs = ("scores", "aside")

    def __init__(self, scores: np.ndarray) -> None:
        self.scores = scores

    def __call__(self, image: np.ndarray, *outputs: str) -> list[np.ndarray]:
        self.image = image
        assert outputs == ("scores",)
        return [self.scores]


@pytest.mark.parametrize(("category", "quarter"), [("full", 3), ("upper", 1), ("lower", 2)])
def test_clothes_are_selected_by_category(category: str, quarter: int):
    scores = np.zeros((1, 4, 8, 8))
    for kind in range(4):
        scores[0, kind, kind // 2 * 4 :][:4, kind % 2 * 4 :][:, :4] = 1
    mask = cloth_mask(
        Canned(scores), PREPARATIONS[MaskModel.U2NET_CLOTH_SEG], Image.new("RGB", (8, 8)), ClothCategory(category)
    )
    expected = np.zeros((8, 8))
    expected[quarter // 2 * 4 :][:4, quarter % 2 * 4 :][:, :4] = 255
    assert np.array_equal(np.asarray(mask), expected)


@pytest.mark.parametrize(
    ("model", "side", "red", "blue"),
    [
        (MaskModel.U2NET, 320, (1 - 0.485) / 0.229, (0.5 - 0.406) / 0.225),
        (MaskModel.ISNET_GENERAL_USE, 1024, 0.5, 0.0),
        (MaskModel.ISNET_ANIME, 1024, 1 - 0.485, 0.5 - 0.406),
    ],
)
def test_networks_get_the_input_they_were_trained_on(model: MaskModel, side: int, red: float, blue: float):
    network = Canned(np.zeros((1, 1, 4, 4)))
    mask = salient_mask(network, PREPARATIONS[model], Image.new("RGB", (30, 20), (100, 0, 50)))
    assert network.image.shape == (1, 3, side, side)
    assert network.image[0, :, 0, 0][[0, 2]] == pytest.approx([red, blue])
    assert (mask.size, mask.getextrema()) == ((30, 20), (0, 0))  # nothing stands out: nothing is selected
