"""Renders the fetched art to one array.

The array is premultiplied RGBA, so that a picture is put on any background by one multiply-add.
"""

import io
import json
import logging
import random
import re
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.packages import PACKAGES, fetch
from training.stages import StateFolder, stage_parser, start_logging

logger = logging.getLogger(__name__)

Style = Literal[
    "3d", "flat", "noto", "twemoji", "noto-v1", "high-contrast", "color", "fxemoji", "emojione", "monochrome"
]
TRAINING_STYLES: tuple[Style, ...] = ("3d", "flat", "noto")
HELD_OUT_STYLE: Style = "twemoji"
# The VAE that training started from had seen Twemoji; this style neither it nor the UNet ever saw.
UNSEEN_STYLE: Style = "noto-v1"
# Networks that recognise pictures learn from more styles, so that they know a thing in a hand they never met.
JUDGE_STYLES: tuple[Style, ...] = (*TRAINING_STYLES, "noto-v1", "high-contrast")
RECOGNITION_STYLES: tuple[Style, ...] = (*JUDGE_STYLES, "color", "fxemoji", "emojione", "monochrome")
RECOGNITION_PX = 128
UNSEEN_PICTURES = 256
CORE_GROUPS = ("smileys", "animals", "food", "travel", "activities", "objects")
SIZE_PX = 256
GROUP_NAMES = {
    0: "smileys",
    1: "people",
    3: "animals",
    4: "food",
    5: "travel",
    6: "activities",
    7: "objects",
    8: "symbols",
}


@dataclass(frozen=True)
class Glyph:
    """One character of a font, to be drawn in black."""

    font: Path
    character: str


Source = Path | str | Glyph


@dataclass(frozen=True)
class Concept:
    """One thing that can be drawn.

    Attributes:
        code: lower-case hexadecimal code points joined by hyphens, without U+FE0F.
        label: its English name.
        tags: English words for it.
        group: one of GROUP_NAMES' values.
        core: trained in every stage; the rest are people, symbols and clock faces.
    """

    code: str
    label: str
    tags: tuple[str, ...]
    group: str
    core: bool


def normalised_code(name: str) -> str:
    """Code points as the data set writes them, from any of the packages' spellings."""
    return name.lower().replace("-fe0f", "").replace("_", "-")


def read_concepts(names_folder: Path) -> list[Concept]:
    """All concepts, in the order of emojibase: skin tones, components and flags are left out."""
    rows = json.loads((names_folder / "en" / "data.json").read_text(encoding="utf-8"))
    concepts = []
    for row in rows:
        group = GROUP_NAMES.get(row.get("group", -1))
        if group is None:
            continue
        label = row["label"].lower().replace("\u2019", "'").replace("\u201c", "").replace("\u201d", "")
        tags = tuple(tag.lower() for tag in row.get("tags", []) if tag.isascii() and len(tag) > 1)
        clock = "o'clock" in label or "thirty" in label
        core = group in CORE_GROUPS and not clock
        concepts.append(Concept(normalised_code(row["hexcode"]), label, tags, group, core))
    return concepts


def icon_svgs(folder: Path, codes: dict[str, str] | None = None) -> dict[str, str]:
    """SVG text by code of an Iconify package.

    Args:
        codes: code by name, for a package that names no code points itself; hyphens in names do not matter.

    Raises:
        ValueError: neither the package nor the caller has codes.
    """
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    if codes is None:
        own = own_names(folder)
        if not own:
            raise ValueError(f"{folder} names no code points, so its icons cannot be told apart")
        pairs = [(code, name) for code, name in own.items()]
    else:
        names = [*icons["icons"], *icons.get("aliases", {})]
        pairs = [(codes[plain_name(name)], name) for name in names if plain_name(name) in codes]
    svgs: dict[str, str] = {}
    for code, name in pairs:
        parent = icons.get("aliases", {}).get(name, {}).get("parent", name)
        icon = icons["icons"].get(name) or icons["icons"].get(parent)
        if icon is None or code in svgs:
            continue
        width, height = (icon.get(side, icons.get(side)) for side in ("width", "height"))
        svgs[code] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )
    return svgs


def own_names(folder: Path) -> dict[str, str]:
    """Name by code, as an Iconify package lists them; empty for some packages."""
    names = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
    return {normalised_code(code): name for code, name in names.items()}


def plain_name(name: str) -> str:
    """A name without what packages spell differently: letters and digits only."""
    return re.sub("[^a-z0-9]", "", name.lower())


def by_plain_name(names: dict[str, str]) -> dict[str, str]:
    """Code by plain name, from name by code."""
    return {plain_name(name): code for code, name in names.items()}


def codes_by_name(names_folder: Path, *listed: dict[str, str]) -> dict[str, str]:
    """Code by plain name: the names packages list, then labels, then the short codes of chat programs."""
    codes: dict[str, str] = {}
    for names in listed:
        codes = by_plain_name(names) | codes
    for concept in read_concepts(names_folder):
        codes.setdefault(plain_name(concept.label), concept.code)
    for file in sorted((names_folder / "en" / "shortcodes").glob("*.json")):
        for code, short in json.loads(file.read_text(encoding="utf-8")).items():
            for name in [short] if isinstance(short, str) else short:
                codes.setdefault(plain_name(name), normalised_code(code))
    return codes


def glyphs(font: Path, concepts: list[Concept]) -> dict[str, Source]:
    """The single characters that a font is to draw, by code."""
    return {c.code: Glyph(font, chr(int(c.code, 16))) for c in concepts if "-" not in c.code}


def art_sources(packages_folder: Path) -> dict[Style, dict[str, Source]]:
    """For every style, what draws each code."""
    folders = {key: fetch(package, packages_folder) for key, package in PACKAGES.items()}
    noto, flat = own_names(folders["noto"]), own_names(folders["flat"])
    codes = codes_by_name(folders["names"], noto, flat)
    font = folders["monochrome"] / "files" / "noto-emoji-emoji-400-normal.woff"
    return {
        "3d": {normalised_code(file.stem): file for file in folders["3d"].glob("assets/*.webp")},
        "flat": dict(icon_svgs(folders["flat"])),
        "noto": dict(icon_svgs(folders["noto"])),
        "twemoji": {normalised_code(file.stem): file for file in folders["twemoji"].glob("*.svg")},
        "noto-v1": dict(icon_svgs(folders["noto-v1"], by_plain_name(noto))),
        "high-contrast": dict(icon_svgs(folders["high-contrast"])),
        "color": dict(icon_svgs(folders["color"], by_plain_name(flat))),
        "fxemoji": dict(icon_svgs(folders["fxemoji"], codes)),
        "emojione": dict(icon_svgs(folders["emojione"], codes)),
        "monochrome": glyphs(font, read_concepts(folders["names"])),
    }


def draw_glyph(glyph: Glyph, size_px: int) -> Image.Image:
    """(size, size) RGBA of one character, black on nothing; the widest of the font fill the square."""
    picture = Image.new("RGBA", (size_px, size_px))
    font = ImageFont.truetype(glyph.font, size=round(size_px * 0.78))
    ImageDraw.Draw(picture).text((size_px / 2, size_px / 2), glyph.character, font=font, fill="black", anchor="mm")
    return picture


def render(source: Source, *, size_px: int = SIZE_PX) -> np.ndarray | None:
    """(size, size, 4) uint8 premultiplied RGBA, centred on a square; None if it cannot be drawn."""
    import resvg_py

    try:
        if isinstance(source, Glyph):
            image = draw_glyph(source, size_px)
        elif isinstance(source, Path) and source.suffix == ".webp":
            image = Image.open(source).convert("RGBA")
        else:
            text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
            png = bytes(resvg_py.svg_to_bytes(svg_string=text, width=size_px, height=size_px))
            image = Image.open(io.BytesIO(png)).convert("RGBA")
    except (OSError, ValueError) as error:
        logger.warning("left out: %s", error)
        return None
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(square, dtype=np.float32)
    pixels = np.concatenate([pixels[..., :3] * pixels[..., 3:] / 255, pixels[..., 3:]], axis=-1)
    if side != size_px:  # resized after premultiplying, so that edges do not darken
        channels = [Image.fromarray(np.ascontiguousarray(pixels[..., c])) for c in range(4)]
        resized = [c.resize((size_px, size_px), Image.Resampling.LANCZOS) for c in channels]
        pixels = np.stack([np.asarray(channel) for channel in resized], axis=-1)
    return (pixels.clip(0, 255) + 0.5).astype(np.uint8)


@dataclass(frozen=True)
class ArtSet:
    """The rendered data set.

    Attributes:
        concepts: all concepts.
        items: (index of the concept, style) of each picture.
        pixels: (pictures, size, size, 4) uint8 premultiplied RGBA, memory-mapped.
    """

    concepts: list[Concept]
    items: list[tuple[int, Style]]
    pixels: np.ndarray

    def pick(
        self,
        *,
        styles: tuple[Style, ...] = TRAINING_STYLES,
        core: bool = True,
        limit: int | None = None,
        labels: frozenset[str] | None = None,
    ) -> list[int]:
        """Indices of the pictures of these styles, of the first `limit` (core) concepts, or of those so labelled."""
        chosen = [index for index, concept in enumerate(self.concepts) if concept.core or not core][:limit]
        allowed = {index for index in chosen if labels is None or self.concepts[index].label in labels}
        return [i for i, (concept, style) in enumerate(self.items) if concept in allowed and style in styles]


def write_art(folder: Path, concepts: list[Concept], items: list[tuple[int, Style]], pixels: np.ndarray) -> None:
    """Store a data set where `load_art` finds it."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "pixels.npy", pixels)
    index = {"concepts": [asdict(concept) for concept in concepts], "items": items}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def load_art(folder: Path) -> ArtSet:
    """The data set that `python -m training.art` wrote.

    Raises:
        FileNotFoundError: it has not run for this state folder.
    """
    if not (folder / "index.json").exists():
        raise FileNotFoundError(f"{folder} has no art; run: python -m training.art")
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    concepts = [Concept(**{**row, "tags": tuple(row["tags"])}) for row in index["concepts"]]
    items = [(concept, style) for concept, style in index["items"]]
    return ArtSet(concepts, items, np.load(folder / "pixels.npy", mmap_mode="r"))


def halved(pixels: np.ndarray) -> np.ndarray:
    """(N, s / 2, s / 2, 4) uint8: each pixel the mean of four, of (N, s, s, 4) uint8."""
    count, side = pixels.shape[:2]
    small = np.empty((count, side // 2, side // 2, 4), np.uint8)
    for start in range(0, count, 64):
        part = pixels[start : start + 64].astype(np.uint16)
        quarters = part[:, ::2, ::2] + part[:, 1::2, ::2] + part[:, ::2, 1::2] + part[:, 1::2, 1::2]
        small[start : start + 64] = (quarters + 2) // 4
    return small


def load_recognition_art(state: StateFolder) -> ArtSet:
    """Everything that recognising is learnt from and measured on, at 128 px, in memory (0.6 GB).

    Raises:
        FileNotFoundError: `python -m training.art` has not run for this state folder.
    """
    art, more = load_art(state.file("art")), load_art(state.file("more"))
    pixels = art.pixels
    while pixels.shape[1] > more.pixels.shape[1]:
        pixels = halved(pixels)
    return ArtSet(art.concepts, [*art.items, *more.items], np.concatenate([pixels, more.pixels]))


def build_art(state: StateFolder, *, limit: int | None = None, size_px: int = SIZE_PX) -> ArtSet:
    """Fetch, render and store what networks are trained on and judged by; about two minutes on two cores."""
    styles = (*TRAINING_STYLES, HELD_OUT_STYLE)
    return _build(state, state.file("art"), styles, limit=limit, size_px=size_px)


def build_unseen_art(state: StateFolder, *, size_px: int = SIZE_PX) -> ArtSet:
    """Fetch, render and store a seeded choice of core concepts in the style that no network ever sees."""
    return _build(state, state.file("unseen"), (UNSEEN_STYLE,), limit=None, size_px=size_px, count=UNSEEN_PICTURES)


def build_more_art(state: StateFolder, *, limit: int | None = None) -> ArtSet:
    """Fetch, render and store the styles that only the recognising networks learn from."""
    styles = tuple(style for style in RECOGNITION_STYLES if style not in TRAINING_STYLES)
    return _build(state, state.file("more"), styles, limit=limit, size_px=RECOGNITION_PX)


def _build(
    state: StateFolder,
    target: Path,
    styles: tuple[Style, ...],
    *,
    limit: int | None,
    size_px: int,
    count: int | None = None,
) -> ArtSet:
    sources = art_sources(state.file("packages"))
    concepts = read_concepts(state.file("packages") / PACKAGES["names"].tarball.removesuffix(".tgz") / "package")
    wanted = [
        (index, style, sources[style][concept.code])
        for index, concept in enumerate(concepts[:limit])
        for style in styles
        if concept.code in sources[style]
    ]
    if count is not None:
        core = [row for row in wanted if concepts[row[0]].core]
        wanted = random.Random(0).sample(core, min(count, len(core)))
    with Pool(2) as pool:
        drawn = pool.map(partial(render, size_px=size_px), [source for _, _, source in wanted], chunksize=32)
    kept = [(wanted[i][:2], picture) for i, picture in enumerate(drawn) if picture is not None]
    write_art(target, concepts, [item for item, _ in kept], np.stack([picture for _, picture in kept]))
    return load_art(target)


def main() -> None:
    """Build the data set and log how many pictures of each style it has."""
    start_logging()
    parser = stage_parser(__doc__)
    parser.add_argument("--unseen-only", action="store_true", help="build only what measures the VAE")
    parser.add_argument("--more-only", action="store_true", help="build only what recognising networks learn besides")
    arguments = parser.parse_args()
    state = StateFolder(arguments.state)
    if arguments.more_only:
        log_styles(build_more_art(state, limit=arguments.concepts))
        return
    unseen = build_unseen_art(state)
    logger.info("%s: %d pictures", UNSEEN_STYLE, len(unseen.items))
    if arguments.unseen_only:
        return
    log_styles(build_art(state, limit=arguments.concepts))
    log_styles(build_more_art(state, limit=arguments.concepts))


def log_styles(art: ArtSet) -> None:
    """Log how many pictures of each style there are."""
    for style in dict.fromkeys(style for _, style in art.items):
        every, core = (len(art.pick(styles=(style,), core=only)) for only in (False, True))
        logger.info("%s: %d pictures, %d of core concepts", style, every, core)


if __name__ == "__main__":
    main()
