"""Writes captions for pictures, the way people write prompts: name, tags, style, background, filler words."""

import random

from training.art import Concept, Style

STYLE_WORDS: dict[Style, tuple[str, ...]] = {
    "3d": ("3d style", "3d render", "3d", "fluent 3d style"),
    "flat": ("flat style", "flat icon", "flat design", "fluent flat style"),
    "noto": ("noto style", "noto emoji style", "noto"),
}
FRAMES = (
    "emoji of {}",
    "an emoji of {}",
    "an icon of {}",
    "picture of {}",
    "a drawing of {}",
    "cute {}",
    "{} emoji",
    "{} icon",
)
# Words that say nothing about the picture; prompts and styles are full of them, so the model learns to draw on.
FILLER = (
    "sharp focus",
    "high quality",
    "best quality",
    "highly detailed",
    "intricate",
    "elegant",
    "beautiful",
    "vivid colors",
    "dynamic light",
    "cinematic",
    "professional",
    "masterpiece",
    "clean",
    "creative",
    "dramatic",
    "detailed background",
    "fine detail",
    "symmetry",
    "glowing",
    "illustration",
    "artwork",
    "crisp",
)


def with_article(noun: str) -> str:
    """The noun after "a" or "an"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def name_words(concept: Concept, rng: random.Random) -> str:
    """The concept by its label (most often), by label and tags, or by tags alone."""
    tags = rng.sample(concept.tags, min(len(concept.tags), rng.randint(1, 3)))
    draw = rng.random()
    if draw < 0.36:
        return concept.label
    if draw < 0.66:
        return with_article(concept.label)
    if draw < 0.80 and tags:
        return ", ".join([concept.label, *tags])
    if draw < 0.87 and tags:
        return " ".join(tags)
    return rng.choice(FRAMES).format(concept.label)


def background_words(colour: str | None, rng: random.Random) -> str:
    """How a caption names the background: nearly always a colour's name, seldom white, or empty."""
    if colour is None:
        return rng.choice(("white background", "on a white background")) if rng.random() < 0.15 else ""
    return rng.choice((f"on a {colour} background", f"{colour} background")) if rng.random() < 0.9 else ""


def filler_words(rng: random.Random) -> str:
    """Two to eight filler words, joined by commas."""
    return ", ".join(rng.sample(FILLER, rng.randint(2, 8)))


def caption(concept: Concept, style: Style, colour: str | None, *, rng: random.Random, filler: float = 0.0) -> str:
    """One caption of a picture.

    Args:
        style: named in most captions if the model draws it.
        colour: name of the background colour; None for white.
        filler: share of captions that end in filler words, 0–1.
    """
    text = name_words(concept, rng)
    style_words = rng.choice(STYLE_WORDS[style]) if style in STYLE_WORDS and rng.random() < 0.8 else ""
    background = background_words(colour, rng)
    if background.startswith("on a") and rng.random() < 0.5:
        text, background = f"{text} {background}", ""
    parts = [style_words, background]
    if rng.random() < 0.2:
        parts.reverse()
    if rng.random() < filler:
        parts.append(filler_words(rng))
    return ", ".join([text, *filter(None, parts)])
