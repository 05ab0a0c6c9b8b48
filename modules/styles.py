"""Reads the style templates and finds them by name."""

import json
import logging
import os
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from modules.choices import STYLE_EXPANSION, STYLE_RANDOM
from modules.errors import UnknownName, near_matches

logger = logging.getLogger(__name__)

PLACEHOLDER = "{prompt}"

SHIPPED_FILES: tuple[str, ...] = (
    "fooocus.json", "sai.json", "mre.json", "ads.json", "artstyle.json", "futuristic.json", "game.json",
    "misc.json", "papercraft.json", "photo.json", "diva.json", "mk.json",
)  # fmt: skip
"""Files of the shipped families in the order of the list; any other file there is the user's own."""

_SPELLING = (("3d", "3D"), ("Sai", "SAI"), ("Mre", "MRE"), ("(s", "(S"))


@dataclass(frozen=True, slots=True)
class StyleTemplate:
    """One style.

    name: as the list shows it.
    prompt: positive text; `{prompt}` marks the place of the user's main line. "" adds nothing.
    negative_prompt: text to avoid, "" for none.
    """

    name: str
    prompt: str = ""
    negative_prompt: str = ""

    @property
    def has_placeholder(self) -> bool:
        """True if the main line goes into the template, so that it need not stand on its own."""
        return PLACEHOLDER in self.prompt

    def positive_lines(self, main_line: str) -> list[str]:
        """The template's lines with the main line put in."""
        return self.prompt.replace(PLACEHOLDER, main_line).splitlines()


@dataclass(frozen=True, slots=True)
class StyleProblem:
    """An entry or a whole file that could not be used: the file's name and the reason, a sentence."""

    file: str
    reason: str


@dataclass(frozen=True)
class StyleTable:
    """All styles, in the order of the list.

    templates: without the two special names.
    problems: what was left out while reading, and why.
    """

    templates: tuple[StyleTemplate, ...]
    problems: tuple[StyleProblem, ...] = ()

    @cached_property
    def _by_name(self) -> Mapping[str, StyleTemplate]:
        return {template.name: template for template in self.templates}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every legal name: "Fooocus V2", "Random Style", then the templates."""
        return (STYLE_EXPANSION, STYLE_RANDOM, *self._by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name or name in (STYLE_EXPANSION, STYLE_RANDOM)

    def template(self, name: str) -> StyleTemplate:
        """The template of that name.

        Raises:
            UnknownName: no template has it (the two special names have none).
        """
        if name not in self._by_name:
            raise UnknownName("style_selections", name, self.names, what="style")
        return self._by_name[name]

    def resolve(self, name: str) -> str:
        """The listed spelling of a name: "sai-anime" is "SAI Anime", letter case and hyphens do not count.

        Raises:
            UnknownName: with the near matches.
        """
        if name in self:
            return name
        wanted = normalise_name(name).casefold()
        for known in self.names:
            if known.casefold() == wanted:
                return known
        raise UnknownName("style_selections", name, self.names, what="style")

    def near(self, name: str) -> list[str]:
        """Up to three legal names that look like `name`, best first."""
        return near_matches(name, self.names)

    def draw(self, rng: random.Random) -> str:
        """A template's name drawn evenly, one call of `rng.choice`.

        Raises:
            UnknownName: the table holds no templates.
        """
        if not self.templates:
            raise UnknownName("style_selections", STYLE_RANDOM, self.names, what="style")
        return rng.choice(self.templates).name


class StyleFolder:
    """The style table of a folder; it is read again when a file of the folder changed, came or went."""

    def __init__(self, folder: Path) -> None:
        """Read nothing yet."""
        self._folder = folder
        self._stamps: dict[str, tuple[int, int]] | None = None
        self._table = StyleTable(())

    @property
    def table(self) -> StyleTable:
        """The styles as the files say now; costs one look at each file."""
        stamps = self._now()
        if stamps != self._stamps:
            self._table, self._stamps = load_styles(self._folder), stamps
        return self._table

    def _now(self) -> dict[str, tuple[int, int]]:
        """File → time of its last change in ns, and bytes."""
        try:
            entries = [entry for entry in os.scandir(self._folder) if entry.name.endswith(".json")]
            return {entry.name: (status.st_mtime_ns, status.st_size) for entry in entries for status in [entry.stat()]}
        except OSError:
            return {}


def normalise_name(name: str) -> str:
    """The name as the list shows it: "sai-3d-model" → "SAI 3D Model"; listed names stay as they are."""
    words = (word[:1].upper() + word[1:].lower() for word in name.replace("-", " ").split())
    shown = " ".join(words)
    for written, meant in _SPELLING:
        shown = shown.replace(written, meant)
    return shown


def load_styles(folder: Path, *more: Path) -> StyleTable:
    """The styles of the JSON files in the folders: users' own files first, then the shipped families.

    A file is a list of {"name", "prompt"?, "negative_prompt"?}, so style files made for Fooocus load as they
    are. A user's entry with the name of a shipped style replaces its texts and keeps its place in the list;
    of a user's own entries with one name the last counts. What cannot be read is left out, logged and listed
    in `problems`.

    Args:
        folder: the shipped styles, where users may add files.
        more: further folders of users' files; folders that do not exist are skipped.
    """
    problems: list[StyleProblem] = []
    own: dict[str, StyleTemplate] = {}
    shipped: dict[str, StyleTemplate] = {}
    for file in _user_files(folder, more):
        own.update((template.name, template) for template in _read_file(file, problems))
    for name in SHIPPED_FILES:
        if (folder / name).is_file():
            shipped.update((template.name, template) for template in _read_file(folder / name, problems))
    for problem in problems:
        logger.warning("Style file %s: %s", problem.file, problem.reason)
    first = [template for name, template in own.items() if name not in shipped]
    last = [own.get(name, template) for name, template in shipped.items()]
    return StyleTable(templates=(*first, *last), problems=tuple(problems))


def _user_files(folder: Path, more: Iterable[Path]) -> list[Path]:
    """Every JSON file that is not one of the shipped families, folder by folder, by name."""
    shipped = {folder / name for name in SHIPPED_FILES}
    found: list[Path] = []
    for place in (folder, *more):
        if place.is_dir():
            found.extend(sorted(path for path in place.glob("*.json") if path not in shipped))
    return found


def _read_file(path: Path, problems: list[StyleProblem]) -> list[StyleTemplate]:
    """The usable entries of one file; the others are added to `problems`."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        problems.append(StyleProblem(path.name, f"The file cannot be read as JSON ({error})."))
        return []
    if not isinstance(entries, list):
        problems.append(StyleProblem(path.name, "The file must hold a list of styles."))
        return []
    templates = []
    for position, entry in enumerate(entries, start=1):
        read = _read_entry(entry)
        if isinstance(read, str):
            problems.append(StyleProblem(path.name, f"Entry {position} is left out: {read}"))
        else:
            templates.append(read)
    return templates


def _read_entry(entry: object) -> StyleTemplate | str:
    """The template of one entry, or the reason why there is none."""
    if not isinstance(entry, dict):
        return "it is not an object with a name."
    texts = {key: entry.get(key) or "" for key in ("name", "prompt", "negative_prompt")}
    for key, text in texts.items():
        if not isinstance(text, str):
            return f"its {key} is not text."
    name = normalise_name(texts["name"])
    if not name:
        return "it has no name."
    if name in (STYLE_EXPANSION, STYLE_RANDOM):
        return f"{name!r} is the name of a built-in function."
    return StyleTemplate(name=name, prompt=texts["prompt"], negative_prompt=texts["negative_prompt"])
