"""Words for pictures: what the small networks see on real photographs, and how it becomes a sentence or tags."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from modules.engine.colours import cielab, look_of
from modules.engine.describe import Look, Scene, sentence, tag_list
from modules.engine.faces import FaceFinder
from modules.engine.onnx_models import OnnxModel
from modules.engine.tags import Tag, tags_of
from modules.errors import (
    EngineFailed,
    InvalidRequest,
    ModelFileMissing,
    ModelFileUnusable,
    NotSupportedYet,
    UnreadableImage,
)
from modules.settings import Settings
from modules.tools import CAPTIONERS, SHIPPED, Toolbox

pytestmark = pytest.mark.engine

DATA = Path(__file__).parents[1] / "data"
PLAIN = Look(colours=("red", "white"), light="", format="square", is_grey=False)


@pytest.fixture(scope="module")
def finder() -> FaceFinder:
    return FaceFinder(SHIPPED)


@pytest.fixture
def toolbox(settings: Settings) -> Toolbox:
    return Toolbox(settings.paths)


def photograph(name: str) -> Image.Image:
    return Image.open(DATA / name).convert("RGB")


def words(toolbox: Toolbox, name: str, *kinds: str) -> str:
    return toolbox.run("describe", {"image_path": str(DATA / name), "kinds": list(kinds)})


# -- whole descriptions ------------------------------------------------------------------------------------------


def test_photographs_are_told_by_what_they_show(toolbox: Toolbox):
    assert words(toolbox, "chelsea.jpg", "Photo").startswith("a photograph of a cat, in brown")
    assert words(toolbox, "coffee.jpg", "Photo").startswith("a photograph of an espresso, in ")
    assert words(toolbox, "astronaut.jpg", "Photo").startswith("a portrait photograph of a person, in ")


def test_tags_are_short_words_between_commas(toolbox: Toolbox):
    tags = words(toolbox, "astronaut.jpg", "Anime").split(", ")
    assert tags[:2] == ["person", "portrait"]
    assert "cat" in words(toolbox, "chelsea.jpg", "Anime").split(", ")


def test_both_kinds_are_joined_photograph_first_and_repeat_themselves(toolbox: Toolbox):
    both = words(toolbox, "coffee.jpg", "Anime", "Photo")
    assert both == f"{words(toolbox, 'coffee.jpg', 'Photo')}, {words(toolbox, 'coffee.jpg', 'Anime')}"
    toolbox.forget()
    assert words(toolbox, "coffee.jpg", "Photo", "Anime") == both


def test_an_unknown_kind_is_refused(toolbox: Toolbox):
    with pytest.raises(InvalidRequest, match="must be Photo or Anime"):
        words(toolbox, "coffee.jpg", "Poem")


@pytest.mark.parametrize("kind", CAPTIONERS)
def test_a_captioner_that_is_asked_for_by_name_is_refused_by_its_file(kind: str, toolbox: Toolbox, settings: Settings):
    file = settings.paths.clip_vision / CAPTIONERS[kind]
    with pytest.raises(ModelFileMissing, match=re.escape(f"{file.name!r} is not in {file.parent}")):
        words(toolbox, "coffee.jpg", kind.upper())
    file.touch()
    with pytest.raises(NotSupportedYet, match="cannot use"):
        words(toolbox, "coffee.jpg", kind.upper())


def test_a_file_that_is_no_picture_is_refused(toolbox: Toolbox, tmp_path: Path):
    (tmp_path / "no.png").write_bytes(b"no picture")
    with pytest.raises(UnreadableImage):
        toolbox.run("describe", {"image_path": str(tmp_path / "no.png"), "kinds": ["Photo"]})


def test_an_unknown_tool_is_refused(toolbox: Toolbox):
    with pytest.raises(EngineFailed, match="'sing'"):
        toolbox.run("sing", {})


# -- words -------------------------------------------------------------------------------------------------------


def test_a_sentence_tells_medium_people_things_colours_light_and_format():
    scene = Scene(
        tags=(Tag("umbrella", 0.7), Tag("tray", 0.1)),
        faces=2,
        largest_face=0.3,
        is_drawing=True,
        look=Look(colours=("blue", "grey", "black"), light="dark", format="landscape", is_grey=False),
    )
    assert sentence(scene) == (
        "a portrait drawing of two people with an umbrella, in blue, grey and black, in dim light, landscape format"
    )
    assert tag_list(scene) == (
        "two people, portrait, umbrella, tray, drawing, blue, grey, black, dark, landscape format"
    )


def test_what_is_not_sure_is_not_told():
    scene = Scene(tags=(Tag("puck", 0.2),), faces=0, largest_face=0, is_drawing=False, look=PLAIN)
    assert sentence(scene) == "a photograph, in red and white, square format"
    assert tag_list(scene) == "red, white, square format"


def test_a_wider_word_stands_for_kinds_the_network_wavers_between():
    names = [f"kind {index}" for index in range(1000)]
    scores = np.zeros(1000)
    scores[[281, 282, 285]] = 0.3, 0.25, 0.25
    assert tags_of(scores, names) == (Tag("cat", pytest.approx(0.8)),)
    scores[[281, 282, 285]] = 0.6, 0.05, 0.15
    assert [tag.name for tag in tags_of(scores, names)] == ["kind 281", "kind 285"]


# -- faces -------------------------------------------------------------------------------------------------------


def test_a_face_is_found_with_its_landmarks_where_it_is(finder: FaceFinder):
    (face,) = finder(photograph("astronaut.jpg"))
    left, top, right, bottom = face.box
    assert (left, top, right, bottom) == pytest.approx((58, 33, 101, 87), abs=4)
    left_eye, right_eye, nose, left_mouth, right_mouth = face.landmarks
    assert left < left_eye[0] < nose[0] < right_eye[0] < right
    assert top < left_eye[1] < nose[1] < left_mouth[1] < bottom
    assert left_mouth[0] < right_mouth[0]


def test_faces_scale_and_move_with_the_picture(finder: FaceFinder):
    small = photograph("astronaut.jpg")
    (face,) = finder(small)
    canvas = Image.new("RGB", (1000, 800), "gray")
    canvas.paste(small.resize((576, 576), Image.Resampling.BICUBIC), (300, 100))
    (moved,) = finder(canvas)
    assert moved.box == pytest.approx(
        [3 * side + shift for side, shift in zip(face.box, (300, 100) * 2, strict=True)], abs=20
    )


@pytest.mark.parametrize("name", ["chelsea.jpg", "coffee.jpg"])
def test_no_face_is_seen_where_there_is_none(name: str, finder: FaceFinder):
    assert finder(photograph(name)) == ()


def test_a_picture_smaller_than_any_face_has_none(finder: FaceFinder):
    assert finder(Image.new("RGB", (4, 3), "white")) == ()


# -- colours -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("colour", "name"),
    [
        ((255, 0, 0), "red"), ((0, 0, 255), "blue"), ((255, 255, 0), "yellow"), ((0, 160, 40), "green"),
        ((255, 140, 0), "orange"), ((255, 150, 190), "pink"), ((100, 60, 35), "brown"),
    ],
)  # fmt: skip
def test_flat_colours_get_their_names(colour: tuple[int, int, int], name: str):
    assert look_of(Image.new("RGB", (30, 30), colour)).colours == (name,)


def test_colours_are_told_by_their_share():
    image = Image.new("RGB", (100, 100), "blue")
    image.paste("yellow", (0, 0, 30, 100))
    image.paste("red", (0, 0, 5, 100))
    assert look_of(image).colours == ("blue", "yellow")


def test_light_format_and_greys_are_seen():
    dark, bright = look_of(Image.new("RGB", (200, 100), (10, 10, 10))), look_of(Image.new("RGB", (100, 200), "white"))
    assert (dark.light, dark.format, dark.is_grey, dark.colours) == ("dark", "landscape", True, ())
    assert (bright.light, bright.format) == ("bright", "portrait")
    assert not look_of(photograph("coffee.jpg")).is_grey
    assert look_of(photograph("coffee.jpg").convert("L").convert("RGB")).is_grey


def test_cielab_agrees_with_published_values():
    lab = cielab(np.array([[255, 255, 255], [255, 0, 0], [0, 0, 255], [119, 119, 119]], float))
    expected = [[100, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86], [50.03, 0, 0]]
    assert lab == pytest.approx(np.array(expected), abs=0.05)


# -- files -------------------------------------------------------------------------------------------------------


def test_shipped_networks_are_the_files_their_list_of_sources_names():
    listed = dict(
        re.findall(r"^\| (\S+\.(?:onnx|txt)) \|.*\| ([0-9a-f]{64}) \|", (SHIPPED / "SOURCES.md").read_text(), re.M)
    )
    networks = sorted(path.name for path in SHIPPED.glob("*.onnx"))
    assert sorted(listed) == sorted([*networks, "imagenet_classes.txt"])
    assert {name: hashlib.sha256((SHIPPED / name).read_bytes()).hexdigest() for name in listed} == listed
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 20e6


def test_a_damaged_network_is_refused(tmp_path: Path):
    with pytest.raises(ModelFileMissing, match=re.escape(str(tmp_path))):
        OnnxModel(tmp_path / "net.onnx")
    (tmp_path / "net.onnx").write_bytes((SHIPPED / "mtcnn_pnet.onnx").read_bytes()[:9000])
    with pytest.raises(ModelFileUnusable, match=r"net\.onnx"):
        OnnxModel(tmp_path / "net.onnx")


def test_a_network_refuses_what_it_cannot_take():
    image = Image.new("RGB", (9, 9))
    ImageDraw.Draw(image).rectangle((2, 2, 5, 5), "white")
    with pytest.raises(ModelFileUnusable, match="mtcnn_rnet"):
        OnnxModel(SHIPPED / "mtcnn_rnet.onnx")(np.asarray(image, float)[None])
