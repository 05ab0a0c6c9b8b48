"""Reads generation parameters back into request fields, from picture files and from pasted text."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal, TypeAlias, cast

from PIL import Image
from pydantic import ValidationError

from modules.choices import (
    ASPECT_RATIOS,
    DEFAULT_VAE,
    FIXED_BY_PERFORMANCE,
    NO_MODEL,
    Performance,
)
from modules.errors import UnreadableImage
from modules.images import READABLE_FORMATS, UNREADABLE
from modules.metadata import REQUEST_KEY, Json, model_stem
from modules.metadata_files import stored_text
from modules.metadata_texts import (
    LABEL_TO_KEY,
    Rows,
    is_comfyui,
    literal,
    parse_object,
    rows_of_a1111,
    rows_of_comfyui,
    rows_of_object,
)
from modules.request import GenerationRequest, to_params

FoundScheme: TypeAlias = Literal["fooocus", "a1111", "comfyui", "focale"]
LORA_ROWS: Final = 5

_PLAIN_FIELDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "image_number": "image_number",
        "prompt": "prompt",
        "negative_prompt": "negative_prompt",
        "performance": "performance_selection",
        "overwrite_switch": "overwrite_switch",
        "guidance_scale": "guidance_scale",
        "sharpness": "sharpness",
        "refiner_swap_method": "refiner_swap_method",
        "adaptive_cfg": "adaptive_cfg",
        "clip_skip": "clip_skip",
        "refiner_switch": "refiner_switch",
        "sampler": "sampler_name",
        "scheduler": "scheduler_name",
        "seed": "image_seed",
        "inpaint_engine_version": "inpaint_engine",
    }
)
_ROW_KEYS: Final = frozenset(LABEL_TO_KEY.values()) - set(GenerationRequest.model_fields) | {REQUEST_KEY}
_LORA_KEY: Final = re.compile(r"lora_combined_(\d{1,4})")
_SIZE: Final = re.compile(r"\(?\s*(\d{1,5})\s*[,xX×*]\s*(\d{1,5})\s*\)?")


@dataclass(frozen=True, slots=True)
class KnownModels:
    """File names that exist; an empty list means "not known", and names are then kept as they stand."""

    checkpoints: Sequence[str] = ()
    loras: Sequence[str] = ()
    vaes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class ReadParameters:
    """What was understood of a file or text.

    scheme: whose parameters they are, None when there are none.
    rows: the table as it was stored, by the keys of the log page.
    request: request fields in wire names, JSON values, each valid; the complete request when `exact`.
    exact: the file carried the request itself.
    problems: sentences for the user about what could not be used.
    """

    scheme: FoundScheme | None = None
    rows: Rows = field(default_factory=dict)
    request: dict[str, Json] = field(default_factory=dict)
    exact: bool = False
    problems: tuple[str, ...] = ()

    def of_this_picture(self) -> dict[str, Json]:
        """Request fields that make this one picture again: its own seed, one image.

        An exact request may be for several pictures. Where the prompt depends on the picture's number (arrays,
        wildcards in order), the text that was used for this one takes its place.
        """
        request = dict(self.request)
        if not self.exact or not self.rows:
            return request
        request["image_number"] = 1
        if str(self.rows.get("seed", "")).isdecimal():
            request["image_seed"] = int(str(self.rows["seed"]))
        if "[[" in str(request.get("prompt")) or request.get("read_wildcards_in_order"):
            request |= {
                key: self.rows[key] for key in ("prompt", "negative_prompt") if isinstance(self.rows.get(key), str)
            }
        return request


def read_picture(source: Path | bytes, *, known: KnownModels | None = None) -> ReadParameters:
    """The parameters in a PNG, JPEG or WebP file, of Focale, Fooocus, A1111 or ComfyUI.

    Raises:
        UnreadableImage: the file is not a picture. A picture without parameters gives an empty result.
    """
    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=READABLE_FORMATS) as image:
            stored = stored_text(image)
    except UNREADABLE as error:
        raise UnreadableImage("image", "The file is not a PNG, JPEG or WebP picture.") from error
    if stored.text is None and stored.request is None:
        graph = parse_object(stored.chunks.get("prompt", ""))
        if graph is not None:
            return _read_object(graph, known or KnownModels(), None)
        return ReadParameters(problems=("The picture carries no generation parameters.",))
    return read_text(stored.text or "", known=known, request_text=stored.request)


def read_text(text: str, *, known: KnownModels | None = None, request_text: str | None = None) -> ReadParameters:
    """The parameters in a text: JSON of the log page or our API, Fooocus JSON, A1111 text, ComfyUI graph.

    Args:
        known: file names that exist, to find models by the names without folder that files carry.
        request_text: the complete request as JSON, if the file stores it beside the text.
    """
    known = known or KnownModels()
    request = parse_object(request_text) if request_text else None
    values = parse_object(text)
    if values is not None:
        return _read_object(values, known, request)
    rows = rows_of_a1111(text)
    if rows:
        return _read_rows("a1111", rows, known, request)
    if request is not None:
        return _read_request(request, {}, ())
    return ReadParameters(problems=("The text holds no generation parameters that Focale understands.",))


def _read_object(values: dict[str, Json], known: KnownModels, request: dict[str, Json] | None) -> ReadParameters:
    inner = values.get("req_params")
    if isinstance(inner, dict):  # a record of our API
        values = cast(dict[str, Json], inner)
    parameters = values.get("parameters")
    if isinstance(parameters, dict):  # what the Metadata tab shows
        values = cast(dict[str, Json], parameters)
    if is_comfyui(values):
        return _read_rows("comfyui", rows_of_comfyui(values), known, request)
    keys = {LABEL_TO_KEY.get(str(name).casefold(), str(name)) for name in values}
    if not keys & _ROW_KEYS and keys & set(GenerationRequest.model_fields):
        return _read_request(values, {}, ())
    return _read_rows("fooocus", rows_of_object(values), known, request)


def _read_request(values: dict[str, Json], rows: Rows, problems: Sequence[str]) -> ReadParameters:
    checked, found = _valid_fields(values)
    return ReadParameters("focale", rows, checked, not found, (*problems, *found))


def _read_rows(
    scheme: Literal["fooocus", "a1111", "comfyui"],
    rows: Rows,
    known: KnownModels,
    request: dict[str, Json] | None,
) -> ReadParameters:
    stored = rows.pop(REQUEST_KEY, None)
    if request is None and isinstance(stored, dict):
        request = cast(dict[str, Json], stored)
    if request is not None:
        checked, problems = _valid_fields(request)
        return ReadParameters(scheme, rows, checked, not problems, problems)
    asked = _Problems()
    fields = _fields_of_rows(rows, known, asked)
    checked, problems = _valid_fields(fields)
    if not checked:
        return ReadParameters(None, rows, {}, False, ("The text holds no generation parameters.", *problems))
    return ReadParameters(scheme, rows, checked, False, (*asked, *problems))


class _Problems(list[str]):
    """Sentences about values that could not be used."""


def _valid_fields(values: Mapping[str, Json]) -> tuple[dict[str, Json], tuple[str, ...]]:
    """The fields a request accepts, as JSON values, and a sentence for each one it does not."""
    kept = {name: value for name, value in values.items() if name in GenerationRequest.model_fields}
    problems: list[str] = []
    while kept:
        try:
            params = cast(dict[str, Json], to_params(GenerationRequest.model_validate(kept)))
        except ValidationError as error:
            reasons = {str(item["loc"][0]): item["msg"] for item in error.errors() if item["loc"]}
            problems += [f"{name} was left out: {reason}." for name, reason in reasons.items()]
            kept = {name: value for name, value in kept.items() if reasons and name not in reasons}
        else:
            return {name: params[name] for name in kept}, tuple(problems)
    return {}, tuple(problems)


def _fields_of_rows(rows: Rows, known: KnownModels, problems: _Problems) -> dict[str, Json]:
    fields: dict[str, Json] = {
        name: rows[key] for key, name in _PLAIN_FIELDS.items() if key in rows and rows[key] not in (None, "")
    }
    for key in ("prompt", "negative_prompt"):
        if isinstance(rows.get(key), str):
            fields[key] = rows[key]
    _take_styles(fields, rows, problems)
    _take_steps(fields, rows)
    _take_size(fields, rows)
    _take_tuple(fields, rows, "adm_guidance", ("adm_scaler_positive", "adm_scaler_negative", "adm_scaler_end"))
    if fields:
        fields["freeu_enabled"] = "freeu" in rows
    _take_tuple(fields, rows, "freeu", ("freeu_b1", "freeu_b2", "freeu_s1", "freeu_s2"))
    _take_model(fields, rows, "base_model", "base_model_name", known.checkpoints, problems)
    _take_model(fields, rows, "refiner_model", "refiner_model_name", known.checkpoints, problems)
    _take_model(fields, rows, "vae", "vae_name", known.vaes, problems)
    if "base_model" in rows:
        fields["loras"] = _loras(rows, known, problems)
    return fields


def _take_styles(fields: dict[str, Json], rows: Rows, problems: _Problems) -> None:
    value = rows.get("styles")
    if isinstance(value, str):
        value = cast(Json, literal(value))
    if isinstance(value, list | tuple):
        fields["style_selections"] = [str(name) for name in value]
    elif "styles" in rows:
        problems.append("The styles could not be read and were left as they are.")


def _take_steps(fields: dict[str, Json], rows: Rows) -> None:
    """Steps equal to the mode's own mean the mode; without a mode, the first one of so many steps."""
    try:
        steps = int(str(rows["steps"]))
    except (KeyError, ValueError):
        return
    by_steps = {facts.steps: mode for mode, facts in reversed(list(FIXED_BY_PERFORMANCE.items()))}
    mode = rows.get("performance") or by_steps.get(steps, Performance.SPEED)
    if mode in list(Performance):
        fields["performance_selection"] = str(mode)
        own_steps = FIXED_BY_PERFORMANCE[Performance(str(mode))].steps
        fields["overwrite_step"] = -1 if steps == own_steps else steps
    else:
        fields["overwrite_step"] = steps


def _take_size(fields: dict[str, Json], rows: Rows) -> None:
    value = rows.get("resolution")
    if isinstance(value, list | tuple):
        value = "x".join(map(str, value))
    match = _SIZE.match(value) if isinstance(value, str) else None
    if not match:
        return
    width, height = int(match[1]), int(match[2])
    if f"{width}*{height}" in ASPECT_RATIOS or max(width, height) > 2048:
        fields |= {
            "aspect_ratios_selection": f"{width}*{height}",
            "overwrite_width": -1,
            "overwrite_height": -1,
        }
    else:
        fields |= {"overwrite_width": width, "overwrite_height": height}


def _take_tuple(fields: dict[str, Json], rows: Rows, key: str, names: tuple[str, ...]) -> None:
    value: object = rows.get(key)
    if isinstance(value, str):
        value = literal(value)
    if isinstance(value, list | tuple) and len(value) == len(names):
        fields |= cast(dict[str, Json], dict(zip(names, value, strict=True)))


def _take_model(
    fields: dict[str, Json], rows: Rows, key: str, name: str, known: Sequence[str], problems: _Problems
) -> None:
    value = rows.get(key)
    if not isinstance(value, str) or not value:
        return
    if value in (NO_MODEL, DEFAULT_VAE):
        fields[name] = value
        return
    found = _find_model(value, known)
    if found is None:
        problems.append(f"{key.replace('_', ' ')} {value[:100]!r} is not on this machine; the choice stays as it is.")
    else:
        fields[name] = found


def _find_model(name: str, known: Sequence[str]) -> str | None:
    """The file that a stored name means: itself, or the one with this name without folder and suffix."""
    if not known or name in known:
        return name
    stem = model_stem(name).casefold()
    return next((candidate for candidate in known if model_stem(candidate).casefold() == stem), None)


def _loras(rows: Rows, known: KnownModels, problems: _Problems) -> list[Json]:
    """LoRA rows, without the performance mode's own, padded with empty ones."""
    of_modes = {model_stem(facts.lora or "") for facts in FIXED_BY_PERFORMANCE.values()}
    found: list[Json] = []
    for enabled, name, weight in _lora_values(rows):
        if model_stem(name) in of_modes or name == NO_MODEL:
            continue
        file_name = _find_model(name, known.loras)
        if file_name is None:
            problems.append(f"The LoRA {name[:100]!r} is not on this machine and was left out.")
        elif not -2 <= weight <= 2:
            problems.append(f"The LoRA {name[:100]!r} was left out: its weight {weight} is not within -2 and 2.")
        else:
            found.append({"enabled": enabled, "model_name": file_name, "weight": weight})
    empty: Json = {"enabled": True, "model_name": NO_MODEL, "weight": 1.0}
    return found + [empty] * (LORA_ROWS - len(found))


def _lora_values(rows: Rows) -> Iterable[tuple[bool, str, float]]:
    """(enabled, name, weight) of `lora_combined_n` (`name : w` or `enabled : name : w`), else of `loras`."""
    numbered = sorted((int(match[1]), key) for key in rows if (match := _LORA_KEY.fullmatch(key)))
    combined: list[Json] = [rows[key] for _, key in numbered]
    listed = rows.get("loras")
    if not combined and isinstance(listed, list | tuple):
        combined = [f"{item[0]} : {item[1]}" for item in listed if isinstance(item, list | tuple) and len(item) >= 2]
    for value in combined:
        parts = [part.strip() for part in str(value).split(" : ")]
        try:
            weight = float(parts[-1])
        except ValueError:
            continue
        if len(parts) == 3:
            yield parts[0].casefold() == "true", parts[1], weight
        elif len(parts) == 2:
            yield True, parts[0], weight
