"""Texts of widgets that are computed: sizes with their ratio, files that are absent, fields in sentences."""

from collections.abc import Iterable
from math import gcd, log

from pydantic import ValidationError

from modules.errors import InvalidRequest
from modules.params import parse_size
from modules.request import GenerationRequest


def aspect_label(size: str) -> str:
    """`1152*896` as `1152×896 ∣ 9:7`."""
    width, height = parse_size(size)
    return f"{width}×{height} ∣ {ratio(width, height)}"


def ratio(width: int, height: int) -> str:
    """Width to height in lowest terms: `9:7`."""
    shared = gcd(width, height)
    return f"{width // shared}:{height // shared}"


def nearest_size(width: int, height: int, sizes: Iterable[str]) -> str:
    """The size such as `1152*896` whose ratio of width to height is nearest to that of a picture."""

    def distance(size: str) -> float:
        listed_width, listed_height = parse_size(size)
        return abs(log(width / height) - log(listed_width / listed_height))

    return min(sizes, key=distance)


def missing_label(name: str) -> str:
    """A file name that says that the file is absent."""
    return f"not here: {name}"


def field_title(path: Iterable[str | int]) -> str:
    """Label of the widget behind a field such as `loras.0.model_name`: `LoRAs 1`."""
    first, *rest = path
    declared = GenerationRequest.model_fields.get(str(first))
    title = (declared.title if declared else None) or str(first)
    number = next((f" {part + 1}" for part in rest if isinstance(part, int)), "")
    return title.rstrip(":") + number


def sentence_of(error: Exception) -> str:
    """An error as a sentence that begins with the label of the widget that caused it."""
    if isinstance(error, InvalidRequest):
        return f"{field_title(error.field)}: {error.message}"
    if isinstance(error, ValidationError):
        return " ".join(
            f"{field_title(detail['loc'])}: {detail['msg']}." if detail["loc"] else f"{detail['msg']}."
            for detail in error.errors(include_url=False)
        )
    return str(error)
