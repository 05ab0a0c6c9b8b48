"""Turns the text of a request into the texts of one image; knows no files and no tensors.

The rules are those of Fooocus: first line and extra lines, `<lora:stem:weight>`, `__wildcard__`, `[[a, b]]`,
styles. Everything random is drawn from `random.Random(seed)` of the image, in this order: main line, main
negative line, extra lines, extra negative lines, random styles. The same seed therefore always gives the
same text.
"""

import random
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from modules.choices import NO_MODEL, STYLE_EXPANSION, STYLE_RANDOM
from modules.expansion import expand_prompt
from modules.styles import StyleTable

WILDCARD_ROUNDS = 64
MAX_EXPANDED_CHARS = 50_000  # a wildcard that names itself twice doubles the text in every round

_ENDS = ",. \r\n"
_WILDCARD = re.compile(r"__([\w-]+)__")
_ARRAY = re.compile(r"\[\[(.*?)\]\]")
_LORA_TAG = re.compile(r"<lora:([^:,]+):([+-]?(?:\d+(?:\.\d*)?|\.\d+))>")

Words = Callable[[str], Sequence[str]]
"""The words of a wildcard name; empty for a name that has no file."""


def no_words(name: str) -> Sequence[str]:
    """The wildcards of a machine that has none."""
    return ()


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """A LoRA file to merge.

    file: path relative to a LoRA folder, or "None" for an empty slot.
    weight: multiple of the file's own strength, any sign.
    """

    file: str
    weight: float


@dataclass(frozen=True, slots=True)
class PromptTask:
    """What a request says about its text; the same for all its images.

    prompt, negative_prompt: as typed, with line ends and all syntax.
    styles: chosen names in order, "Fooocus V2" and "Random Style" included, in any spelling `StyleTable.resolve` knows.
    loras: the enabled LoRAs of the request, "None" entries allowed.
    max_loras: slots; inline tags can fill what is left of them.
    wildcards_in_order: image i takes line i of every wildcard instead of a random line.
    """

    prompt: str
    negative_prompt: str = ""
    styles: tuple[str, ...] = ()
    loras: tuple[LoraChoice, ...] = ()
    max_loras: int = 5
    wildcards_in_order: bool = False


@dataclass(frozen=True, slots=True)
class PromptSources:
    """What this machine offers to prompts.

    styles: the style table.
    words: lines of a wildcard, by name.
    lora_files: stem → file, see `lora_stems`.
    expand: the text "Fooocus V2" adds for (main line, seed); "" adds nothing.
    """

    styles: StyleTable
    words: Words = no_words
    lora_files: Mapping[str, str] = field(default_factory=dict)
    expand: Callable[[str, int], str] = expand_prompt


@dataclass(frozen=True, slots=True)
class ImagePrompt:
    """The texts of one image, ready to be encoded.

    positive_texts, negative_texts: encoded one by one and joined along the tokens; the expansion is the last
        positive one.
    positive_pooled, negative_pooled: how many texts, from the first, add to the pooled embedding (not the
        expansion).
    prompt, negative_prompt: main and extra lines after wildcards and arrays, for the log and the metadata.
    expansion: what "Fooocus V2" made of the main line, "" if it was off.
    styles: chosen names with random ones resolved; "Fooocus V2" is first if it was used.
    loras: the request's LoRAs and those of tags, within the slots; the request's own, untouched, when no tag
        added any.
    tagged_loras: those of `loras` that come from tags.
    unknown_loras: names in tags that no LoRA file has; they had no effect.
    """

    positive_texts: tuple[str, ...]
    negative_texts: tuple[str, ...]
    positive_pooled: int
    negative_pooled: int
    prompt: str
    negative_prompt: str
    expansion: str
    styles: tuple[str, ...]
    loras: tuple[LoraChoice, ...]
    tagged_loras: tuple[LoraChoice, ...]
    unknown_loras: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TagScan:
    """A line whose LoRA tags were taken out: the rest, the choices found, and the names that no file has."""

    text: str
    found: tuple[LoraChoice, ...]
    unknown: tuple[str, ...]


def prepare_image_prompt(task: PromptTask, sources: PromptSources, *, index: int, seed: int) -> ImagePrompt:
    """The texts of image `index` (from 0) of a task.

    A LoRA tag inside an array, `[[<lora:ink:1> a fox, a cat]]`, belongs to the images that take its element,
    and a tag in a wildcard's line to the images that draw this line. (Fooocus loads the first kind for every
    image and encodes the second as words; its documentation promises what is done here.)

    Args:
        task: what was asked.
        sources: styles, wildcards, LoRA files.
        index: position in the request; selects array elements and, in order, wildcard lines.
        seed: of this image, 0 … 2^63 − 1.
    Raises:
        UnknownName: a style of the task is not in the table.
    """
    rng = random.Random(seed)
    fill = _wildcard_filler(sources.words, rng, index if task.wildcards_in_order else None)
    (main, *extras), (negative, *negative_extras) = (
        split_lines(task.prompt),
        split_lines(task.negative_prompt),
    )

    fixed = take_lora_tags(main, sources.lora_files)
    drawn = take_lora_tags(choose_elements(fill(fixed.text), index), sources.lora_files, only_if_any=True)
    negative = fill(negative)
    extras = [fill(line) for line in extras]
    negative_extras = [fill(line) for line in negative_extras]
    loras, tagged = add_tagged_loras(task.loras, fixed.found + drawn.found, task.max_loras)

    chosen = [sources.styles.resolve(name) for name in task.styles]
    templates = [name for name in chosen if name != STYLE_EXPANSION]
    resolved = [sources.styles.draw(rng) if name == STYLE_RANDOM else name for name in templates]
    positive, avoided = styled_texts(drawn.text, negative, resolved, sources.styles)
    positive_texts = _without_empty([*positive, *extras], drawn.text)
    negative_texts = _without_empty([*avoided, *negative_extras], negative)

    expands = STYLE_EXPANSION in chosen and main != ""
    expansion = sources.expand(drawn.text, seed) if expands else ""
    return ImagePrompt(
        positive_texts=(*positive_texts, expansion) if expansion else positive_texts,
        negative_texts=negative_texts,
        positive_pooled=len(positive_texts),
        negative_pooled=len(negative_texts),
        prompt="\n".join([drawn.text, *extras]),
        negative_prompt="\n".join([negative, *negative_extras]),
        expansion=expansion,
        styles=(STYLE_EXPANSION, *resolved) if expands else tuple(resolved),
        loras=loras,
        tagged_loras=tagged,
        unknown_loras=fixed.unknown + drawn.unknown,
    )


def clean_line(text: str) -> str:
    """The line with runs of spaces made one and commas, full stops, spaces and line ends cut off both ends.

    Fooocus halves runs of spaces sixteen times, which leaves longer runs than anybody types; here all become
    one.
    """
    return re.sub(" {2,}", " ", text).strip(_ENDS)


def split_lines(prompt: str) -> list[str]:
    """The cleaned lines of a prompt without the empty ones, at least one; the first is the main line."""
    return [line for line in map(clean_line, prompt.splitlines()) if line] or [""]


def tidy_commas(text: str) -> str:
    """The line with one space between words and `, ` between its parts; empty parts go."""
    parts = (part.strip() for part in re.sub(" {2,}", " ", text).split(","))
    return ", ".join(part for part in parts if part)


def lora_stems(files: Iterable[str], hidden: Collection[str] = ()) -> dict[str, str]:
    """LoRA files by stem (no folder, no suffix), the name a tag uses; the first of equal stems wins.

    Args:
        files: paths relative to the LoRA folders, with either kind of slash.
        hidden: files no tag may name, such as the LoRA a performance mode adds by itself.
    """
    stems: dict[str, str] = {}
    for file in files:
        if file not in hidden:
            stems.setdefault(re.split(r"[\\/]", file)[-1].rpartition(".")[0], file)
    return stems


def take_lora_tags(line: str, lora_files: Mapping[str, str], *, only_if_any: bool = False) -> TagScan:
    """Takes `<lora:stem:weight>` out of a main line and tidies its commas.

    Tags that an array or a wildcard decides about, `[[<lora:a:1>, b]]` and `<lora:__mood__:1>`, stay for the
    second scan, when arrays and wildcards are resolved. A tag whose stem is no file is taken out and has no
    effect.

    Args:
        line: main line of a positive prompt.
        lora_files: stem → file.
        only_if_any: leave a line without tags exactly as it is.
    """
    found: list[LoraChoice] = []
    unknown: list[str] = []

    def take(tag: re.Match[str]) -> str:
        name, weight = tag[1].strip(), float(tag[2])
        if name in lora_files:
            choice = LoraChoice(lora_files[name], weight)
            if choice not in found:
                found.append(choice)
        elif _WILDCARD.search(name):
            return tag[0]
        else:
            unknown.append(name)
        return ""

    if only_if_any and not _LORA_TAG.search(line):
        return TagScan(line, (), ())
    pieces = re.split(r"(\[\[.*?\]\])", line)
    text = "".join(piece if odd % 2 else _LORA_TAG.sub(take, piece) for odd, piece in enumerate(pieces))
    return TagScan(tidy_commas(text), tuple(found), tuple(unknown))


def add_tagged_loras(
    chosen: tuple[LoraChoice, ...], tagged: Sequence[LoraChoice], max_loras: int
) -> tuple[tuple[LoraChoice, ...], tuple[LoraChoice, ...]]:
    """(all LoRAs, those of them that came from tags).

    A file that is chosen in the request keeps its weight. When nothing is added, `chosen` comes back
    untouched; otherwise its "None" entries go and the whole is cut to `max_loras`.
    """
    files = {choice.file for choice in chosen}
    added = tuple(dict.fromkeys(choice for choice in tagged if choice.file not in files))
    if not added:
        return chosen, ()
    kept = tuple(choice for choice in chosen if choice.file != NO_MODEL)
    combined = (*kept, *added)[: max(max_loras, 0)]
    return combined, combined[len(kept) :]


def fill_wildcards(text: str, words: Words, rng: random.Random, *, in_order: int | None = None) -> str:
    """The text with every `__name__` replaced by a line of that wildcard, also within the lines put in.

    A name without a file becomes the bare name. At most 64 rounds, and at most about 50,000 characters, so
    that wildcards that name each other in a circle come to an end.

    Args:
        text: one line.
        words: lines of a wildcard.
        rng: draws the lines, one per placeholder, left to right within a round.
        in_order: take line `in_order mod n` everywhere instead.
    """
    for _ in range(WILDCARD_ROUNDS):
        names: list[str] = _WILDCARD.findall(text)
        if not names:
            break
        for name in names:
            lines = words(name)
            if not lines:
                text = text.replace(f"__{name}__", name)
                continue
            line = rng.choice(lines) if in_order is None else lines[in_order % len(lines)]
            text = text.replace(f"__{name}__", line, 1)
            if len(text) > MAX_EXPANDED_CHARS:
                return _WILDCARD.sub(r"\1", text[:MAX_EXPANDED_CHARS])
    return text


def choose_elements(text: str, index: int) -> str:
    """The line with every array `[[a, b]]` replaced by one element for image `index`.

    All combinations come in turn, the first array changing fastest; then they start again. Elements keep
    their spaces.
    """

    def choose(array: re.Match[str]) -> str:
        nonlocal index
        elements = array[1].split(",")
        index, position = divmod(index, len(elements))
        return elements[position]

    return _ARRAY.sub(choose, text)


def array_combinations(prompt: str) -> int:
    """How many different images the arrays of a prompt's main line ask for; 1 without arrays."""
    total = 1
    for body in _ARRAY.findall(split_lines(prompt)[0]):
        total *= len(body.split(","))
    return total


def styled_texts(
    prompt: str, negative_prompt: str, styles: Sequence[str], table: StyleTable
) -> tuple[list[str], list[str]]:
    """(positive texts, negative texts) of the main lines with the styles applied, empty texts included.

    A template with `{prompt}` takes the main line in; when none of them has the placeholder, the main line
    comes first. The negative line follows the styles' negative texts.

    Raises:
        UnknownName: a style is not in the table.
    """
    templates = [table.template(name) for name in styles]
    positive = [line for template in templates for line in template.positive_lines(prompt)]
    negative = [line for template in templates for line in template.negative_prompt.splitlines()]
    if not any(template.has_placeholder for template in templates):
        positive = [prompt, *positive]
    return positive, [*negative, negative_prompt]


def _without_empty(texts: Sequence[str], fallback: str) -> tuple[str, ...]:
    """The texts that say something, or the fallback alone: there is always one text to encode."""
    return tuple(text for text in texts if text) or (fallback,)


def _wildcard_filler(words: Words, rng: random.Random, in_order: int | None) -> Callable[[str], str]:
    """`fill_wildcards` with everything given but the text."""

    def fill(text: str) -> str:
        return fill_wildcards(text, words, rng, in_order=in_order)

    return fill
