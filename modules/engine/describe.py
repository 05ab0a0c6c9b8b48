"""Finds words for a picture: a sentence for photographs, tags for drawings, both made of what small networks see."""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from modules.engine.censor import NsfwClassifier
from modules.engine.colours import Look, look_of
from modules.engine.concepts import ConceptFinder, is_on_plain_ground
from modules.engine.faces import Face, FaceFinder
from modules.engine.tags import Tag, Tagger

SURE = 0.25  # probability from which a tag is told as what the picture shows
SURE_OF_CONCEPT = 0.4  # the same for the concepts of drawings: nothing beside them is known
PORTRAIT_FACE = 0.18  # height of a face in picture heights that makes a portrait
_PEOPLE = {1: "a person", 2: "two people", 3: "three people", 4: "four people"}


@dataclass(frozen=True)
class Scene:
    """What was seen in a picture.

    largest_face: its height in picture heights; 0 without faces.
    is_drawing: drawn rather than photographed.
    """

    tags: tuple[Tag, ...]
    faces: int
    largest_face: float
    is_drawing: bool
    look: Look


class Describer:
    """The networks behind a description; the same picture always gets the same words."""

    def __init__(self, folder: Path, classifier: NsfwClassifier, concepts: ConceptFinder) -> None:
        """Load the networks of a folder; two are given, since others use them too.

        Raises:
            ModelFileMissing, ModelFileUnusable: see `OnnxModel`.
        """
        self._tagger = Tagger(folder)
        self._faces = FaceFinder(folder)
        self._classifier = classifier
        self._concepts = concepts

    def __call__(self, image: Image.Image) -> Scene:
        """What an RGB picture shows."""
        icon = self._icon(image)
        faces: tuple[Face, ...] = () if icon else self._faces(image)
        return Scene(
            tags=(icon,) if icon else self._tagger(image),
            faces=len(faces),
            largest_face=max((face.height for face in faces), default=0.0) / image.height,
            is_drawing=icon is not None or self._classifier(image).drawn > 0.5,
            look=look_of(image),
        )

    def _icon(self, image: Image.Image) -> Tag | None:
        """The concept that a single drawn thing on a plain ground surely is."""
        likeliest = self._concepts(image, count=1)[0] if is_on_plain_ground(image) else None
        return likeliest if likeliest and likeliest.probability >= SURE_OF_CONCEPT else None


def sentence(scene: Scene) -> str:
    """One sentence, usable as a prompt: "a photograph of a cat, in brown and beige, landscape format"."""
    medium = "drawing" if scene.is_drawing else "photograph"
    if scene.look.is_grey:
        medium = f"black and white {medium}"
    if scene.largest_face >= PORTRAIT_FACE:
        medium = f"portrait {medium}"
    parts = [f"{_with_article(medium)} of {subject}" if (subject := _subject(scene)) else _with_article(medium)]
    if scene.look.colours:
        parts.append(f"in {_listed(scene.look.colours)}")
    if scene.look.light:
        parts.append("in dim light" if scene.look.light == "dark" else "in bright light")
    parts.append(f"{scene.look.format} format")
    return ", ".join(parts)


def tag_list(scene: Scene) -> str:
    """Tags joined by commas: people, what is shown, the medium, colours, light, format."""
    people = [_PEOPLE.get(scene.faces, "crowd").removeprefix("a ")] if scene.faces else []
    if scene.largest_face >= PORTRAIT_FACE:
        people.append("portrait")
    medium = ["drawing"] if scene.is_drawing else []
    shades = ["monochrome"] if scene.look.is_grey else list(scene.look.colours)
    light = {"dark": ["dark"], "bright": ["bright"]}.get(scene.look.light, [])
    shape = [] if scene.look.format == "portrait" and "portrait" in people else [f"{scene.look.format} format"]
    things = [tag.name for tag in scene.tags] if scene.tags and scene.tags[0].probability >= SURE else []
    return ", ".join([*people, *things, *medium, *shades, *light, *shape])


def _subject(scene: Scene) -> str:
    """Who and what is shown; empty where nothing is sure."""
    things = [_with_article(tag.name) for tag in scene.tags if tag.probability >= SURE][:2]
    people = _PEOPLE.get(scene.faces, "a group of people") if scene.faces else ""
    if people and things:
        return f"{people} with {_listed(things)}"
    return people or _listed(things)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def _listed(words: tuple[str, ...] | list[str]) -> str:
    """Words as English lists them."""
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"
