"""Pictures are the art on the background that their caption names."""

import random

import pytest
import torch

from training.art import ArtSet
from training.captions import STYLE_WORDS, background_words, caption
from training.curriculum import Curriculum, everyday_labels
from training.evaluate import middle_square, nearest_colour
from training.pictures import AUGMENTED, COLOURS, Placement, background, compose, place


@pytest.mark.parametrize("colour", [None, *COLOURS])
def test_judged_background_is_the_one_drawn(art: ArtSet, colour: str | None) -> None:
    smaller = Placement(scale=(0.6, 0.7), shift=0.0)
    pixels = compose(art, [0, 5], [colour, colour], rng=random.Random(1), placement=smaller)
    assert nearest_colour(pixels) == [colour or "white"] * 2


@pytest.mark.parametrize(("height", "width"), [(112, 144), (160, 96), (128, 128), (256, 256)])
def test_judge_sees_the_middle_square_at_its_own_size(height: int, width: int) -> None:
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    pixels = torch.full((2, 3, height, width), -1.0)
    pixels[..., top : top + side, left : left + side] = 0.5
    seen = middle_square(pixels)
    assert seen.shape == (2, 3, 128, 128)
    torch.testing.assert_close(seen, torch.full_like(seen, 0.5))


def test_pictures_are_pixels_of_the_size_asked_for(art: ArtSet) -> None:
    pixels = compose(art, [0, 1, 2], [None, "red", "blue"], rng=random.Random(0), height=112, width=144)
    assert pixels.shape == (3, 3, 112, 144)
    assert float(pixels.min()) >= -1
    assert float(pixels.max()) <= 1


def test_art_stays_round_in_an_oblong_picture() -> None:
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    disc = (torch.hypot(rows, columns) < 0.8).float().expand(1, 4, 64, 64)
    alpha = place(disc, 96, 160, Placement(scale=(1.0, 1.0), shift=0.0), random.Random(0))[0, 3] > 0.5
    height, width = int(alpha.any(1).sum()), int(alpha.any(0).sum())
    assert abs(height - width) <= 2
    assert 72 <= height <= 82


def test_same_seed_gives_the_same_picture(art: ArtSet) -> None:
    one, other = (compose(art, [3], ["teal"], rng=random.Random(7), placement=AUGMENTED) for _ in range(2))
    assert torch.equal(one, other)


def test_background_none_is_nearly_white() -> None:
    assert float(background(None, 32, 32, random.Random(3)).min()) > 0.9


def test_captions_name_no_other_style_and_no_other_colour(art: ArtSet) -> None:
    rng = random.Random(0)
    others = [word for style in ("flat", "noto") for word in STYLE_WORDS[style]]
    for _ in range(300):
        text = caption(art.concepts[0], "3d", "dark blue", rng=rng, filler=0.5)
        assert not any(f", {word}" in text for word in others)
        assert "background" not in text.replace("dark blue background", "").replace("detailed background", "")


def test_most_coloured_backgrounds_are_named() -> None:
    rng = random.Random(0)
    named = sum(bool(background_words("pink", rng)) for _ in range(500))
    assert 420 < named < 480


def test_everyday_concepts_get_their_share(art: ArtSet) -> None:
    rows = art.pick()
    known = {i for i in rows if art.concepts[art.items[i][0]].label in everyday_labels()}
    assert 0 < len(known) < len(rows)
    drawn = Curriculum(art, rows, everyday_share=0.9).draw(4000, rng=random.Random(0))
    share = sum(rows[position] in known for position in drawn) / len(drawn)
    assert 0.87 < share < 0.93


def test_held_out_style_is_never_picked_unasked(art: ArtSet) -> None:
    assert {art.items[i][1] for i in art.pick(core=False)} == {"3d", "flat", "noto"}
