"""Drawn things are told from photographs by their ground, and named by the image tower and its bank."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from modules.engine.concepts import BANK_FILE, TOWER_FILE, ConceptFinder, is_on_plain_ground, squared
from modules.errors import ModelFileMissing, ModelFileUnusable
from modules.tools import IMAGE_TOWER

pytestmark = pytest.mark.engine

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def finder() -> ConceptFinder:
    return ConceptFinder(IMAGE_TOWER)


def disc(size: tuple[int, int], colour: str, ground: str) -> Image.Image:
    """A disc in the middle of a plain ground."""
    picture = Image.new("RGB", size, ground)
    pen, reach = ImageDraw.Draw(picture), 0.4 * min(size)
    middle = (size[0] / 2, size[1] / 2)
    pen.circle(middle, reach, fill=colour)
    return picture


def test_photographs_have_no_plain_ground_and_icons_do():
    for name in ("astronaut.jpg", "chelsea.jpg", "coffee.jpg"):
        assert not is_on_plain_ground(Image.open(DATA / name).convert("RGB"))
    assert is_on_plain_ground(disc((128, 96), "red", "teal"))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert not is_on_plain_ground(Image.fromarray(noise))


def test_a_picture_is_made_square_in_the_colour_of_its_border():
    picture = squared(disc((128, 64), "red", "#102030"))
    assert picture.size == (128, 128)
    assert picture.getpixel((0, 0)) == picture.getpixel((127, 127)) == (16, 32, 48)
    assert picture.getpixel((64, 64)) == (255, 0, 0)


def test_size_format_and_side_do_not_matter(finder: ConceptFinder):
    pictures = [disc(size, "red", "white") for size in ((192, 192), (384, 384), (300, 192))]
    pictures.append(pictures[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    likeliest = [finder(picture)[0] for picture in pictures]
    assert len({tag.name for tag in likeliest}) == 1
    assert likeliest[0].probability == pytest.approx(likeliest[3].probability, abs=1e-4)


def test_guesses_are_ordered_and_shares_of_one(finder: ConceptFinder):
    guesses = finder(disc((96, 96), "orange", "white"), count=2000)
    shares = [tag.probability for tag in guesses]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=1e-4)
    assert len({tag.name for tag in guesses}) == len(guesses) == 1008


@pytest.mark.parametrize("missing", [TOWER_FILE, BANK_FILE])
def test_a_missing_file_is_named(missing: str, tmp_path: Path):
    for name in {TOWER_FILE, BANK_FILE} - {missing}:
        shutil.copy(IMAGE_TOWER / name, tmp_path)
    with pytest.raises(ModelFileMissing, match=missing):
        ConceptFinder(tmp_path)


@pytest.mark.parametrize("damaged", [TOWER_FILE, BANK_FILE])
def test_a_damaged_file_is_refused(damaged: str, tmp_path: Path):
    for name in (TOWER_FILE, BANK_FILE):
        shutil.copy(IMAGE_TOWER / name, tmp_path)
    (tmp_path / damaged).write_bytes((tmp_path / damaged).read_bytes()[:5000])
    with pytest.raises(ModelFileUnusable, match="cannot be read"):
        ConceptFinder(tmp_path)
