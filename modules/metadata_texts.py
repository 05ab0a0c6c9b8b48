"""Generation parameters of several programs as one table: Fooocus, A1111, ComfyUI.

Everything here comes from foreign files: nothing is evaluated, everything may be missing or of the wrong type.
"""

import ast
import json
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, cast

from modules.choices import SamplerName, SchedulerName
from modules.metadata import A1111_SAMPLERS, REQUEST_ITEM, REQUEST_KEY, Json

Rows = dict[str, Json]

MAX_TEXT: Final = 4 * 2**20  # characters; longer texts are not parameters
MAX_LITERAL: Final = 100_000

LABEL_TO_KEY: Final[Mapping[str, str]] = MappingProxyType(
    {
        "prompt": "prompt",
        "negative prompt": "negative_prompt",
        "fooocus v2 expansion": "prompt_expansion",
        "styles": "styles",
        "performance": "performance",
        "steps": "steps",
        "resolution": "resolution",
        "guidance scale": "guidance_scale",
        "sharpness": "sharpness",
        "adm guidance": "adm_guidance",
        "base model": "base_model",
        "refiner model": "refiner_model",
        "refiner switch": "refiner_switch",
        "overwrite switch": "overwrite_switch",
        "refiner swap method": "refiner_swap_method",
        "cfg mimicking from tsnr": "adaptive_cfg",
        "clip skip": "clip_skip",
        "sampler": "sampler",
        "scheduler": "scheduler",
        "vae": "vae",
        "seed": "seed",
        "freeu": "freeu",
        "metadata scheme": "metadata_scheme",
        "version": "version",
        "image number": "image_number",
        "inpaint engine version": "inpaint_engine_version",
        "inpaint method": "inpaint_method",
    }
)
"""Labels of the log page, in lower case, and the keys they stand for."""

_ITEM_TO_KEY: Final[Mapping[str, str]] = MappingProxyType(
    {
        "steps": "steps",
        "sampler": "sampler",
        "schedule type": "scheduler",
        "scheduler": "scheduler",
        "seed": "seed",
        "size": "resolution",
        "cfg scale": "guidance_scale",
        "sharpness": "sharpness",
        "adm guidance": "adm_guidance",
        "model": "base_model",
        "model hash": "base_model_hash",
        "performance": "performance",
        "vae": "vae",
        "raw prompt": "prompt",
        "raw negative prompt": "negative_prompt",
        "refiner": "refiner_model",
        "refiner hash": "refiner_model_hash",
        "refiner switch": "refiner_switch",
        "adaptive cfg": "adaptive_cfg",
        "clip skip": "clip_skip",
        "overwrite switch": "overwrite_switch",
        "refiner swap method": "refiner_swap_method",
        "freeu": "freeu",
        "styles": "styles",
        "expansion": "prompt_expansion",
        "version": "version",
        "user": "created_by",
    }
)

_ITEM: Final = re.compile(r'\s*([^:,"]{1,80}?):\s*(?:("(?:\\.|[^"\\])*")|([^,]*))\s*(?:,|$)')
_LORA_LABEL: Final = re.compile(r"lora (\d+)", re.IGNORECASE)
_OLD_LORA_LABEL: Final = re.compile(r"lora \[(.+)\] weight", re.IGNORECASE)
_SAMPLERS_BY_LABEL: Final[Mapping[str, SamplerName]] = MappingProxyType(
    {
        label.casefold(): name for name, label in A1111_SAMPLERS.items()
    }  # of two with one label the _gpu one, the default
)
_A1111_SCHEDULES: Final[Mapping[str, SchedulerName]] = MappingProxyType(
    {
        "uniform": SchedulerName.NORMAL,
        "automatic": SchedulerName.NORMAL,
        "ddim": SchedulerName.DDIM_UNIFORM,
    }
)


def parse_object(text: str) -> dict[str, Json] | None:
    """The object a text holds, in JSON or in Python's spelling, or None. Never evaluates anything."""
    text = text.strip()
    if not text.startswith("{") or len(text) > MAX_TEXT:
        return None
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        value = literal(text)
    return cast(dict[str, Json], value) if isinstance(value, dict) else None


def literal(text: str) -> object:
    """The Python literal a text holds (numbers, texts, lists, tuples, dicts), or None for anything else."""
    if len(text) > MAX_LITERAL:
        return None
    try:
        value: object = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value


def rows_of_object(values: Mapping[str, Json]) -> Rows:
    """Rows by key from an object whose keys are keys or labels of the log page."""
    found: Rows = {}
    for name, value in values.items():
        name = str(name)
        number, old = _LORA_LABEL.fullmatch(name), _OLD_LORA_LABEL.fullmatch(name)
        if number:
            found[f"lora_combined_{number[1]}"] = value
        elif old:
            found[f"lora_combined_{len(found) + 1000}"] = f"{old[1]} : {value}"
        else:
            found[LABEL_TO_KEY.get(name.casefold(), name)] = value
    return found


def rows_of_a1111(text: str) -> Rows:
    """Rows by key from A1111 text: prompt, a line `Negative prompt: …`, a line of `Name: value` items.

    `REQUEST_KEY` holds the complete request if the text carries one. Empty when the text is nothing of the kind.
    """
    lines = text.replace("\r\n", "\n").strip("\n").split("\n")
    items = _items(lines[-1])
    if "steps" not in items and "seed" not in items:
        return {}
    positive, negative = _prompt_parts(lines[:-1])
    found: Rows = {"prompt": positive, "negative_prompt": negative}
    for item, key in _ITEM_TO_KEY.items():
        if item in items:
            found[key] = items[item]
    if REQUEST_ITEM.casefold() in items:
        request = parse_object(items[REQUEST_ITEM.casefold()])
        if request is not None:
            found[REQUEST_KEY] = request
    _split_sampler(found)
    for number, pair in enumerate(filter(None, items.get("lora weights", "").split(", ")), start=1):
        name, _, weight = pair.rpartition(": ")
        found[f"lora_combined_{number}"] = f"{name} : {weight}"
    if "raw prompt" not in items:
        found.setdefault("styles", "[]")  # another program's prompt is complete as it is
    return found


def rows_of_comfyui(graph: Mapping[str, Json]) -> Rows:
    """What a ComfyUI graph (the `prompt` chunk) tells: prompts, seed, size, sampling, model. Best effort."""
    nodes = {str(name): node for name, node in graph.items() if isinstance(node, Mapping) and "class_type" in node}
    found: Rows = {}
    for node in nodes.values():
        inputs = node.get("inputs")
        if not isinstance(inputs, Mapping):
            continue
        kind = str(node.get("class_type"))
        if "KSampler" in kind:
            _take_sampling(found, inputs, nodes)
        elif kind.startswith("CheckpointLoader"):
            _take(found, "base_model", inputs.get("ckpt_name"))
        elif kind == "LoraLoader" and isinstance(inputs.get("lora_name"), str):
            number = 1 + sum(key.startswith("lora_combined_") for key in found)
            found[f"lora_combined_{number}"] = f"{inputs['lora_name']} : {inputs.get('strength_model', 1.0)}"
        elif kind.startswith("EmptyLatent"):
            width, height = inputs.get("width"), inputs.get("height")
            if isinstance(width, int) and isinstance(height, int):
                _take(found, "resolution", str((width, height)))
    if found:
        found["styles"] = "[]"
    return found


def is_comfyui(values: Mapping[str, Json]) -> bool:
    """True for an object that looks like a ComfyUI graph."""
    return any(isinstance(node, Mapping) and "class_type" in node for node in values.values())


def _items(line: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for match in _ITEM.finditer(line):
        value = match[3]
        if match[2] is not None:
            try:
                value = str(json.loads(match[2], strict=False))
            except ValueError:
                value = match[2][1:-1]
        found.setdefault(match[1].strip().casefold(), value.strip() if match[2] is None else value)
    return found


def _prompt_parts(lines: list[str]) -> tuple[str, str]:
    mark = "negative prompt:"
    for number in range(len(lines) - 1, -1, -1):
        if lines[number].casefold().startswith(mark):
            first = lines[number][len(mark) :].removeprefix(" ")
            return "\n".join(lines[:number]), "\n".join([first, *lines[number + 1 :]])
    return "\n".join(lines), ""


def _split_sampler(found: Rows) -> None:
    """`DPM++ 2M SDE Karras` becomes a sampler and a scheduler; an explicit scheduler wins."""
    shown = str(found.get("sampler", "")).strip().casefold()
    if shown.endswith(" karras"):
        shown = shown.removesuffix(" karras")
        found.setdefault("scheduler", SchedulerName.KARRAS)
    if shown:
        found["sampler"] = _SAMPLERS_BY_LABEL.get(shown, shown)
    if "scheduler" in found:
        schedule = str(found["scheduler"]).strip().casefold()
        found["scheduler"] = _A1111_SCHEDULES.get(schedule, schedule.replace(" ", "_"))


def _take(found: Rows, key: str, value: Json) -> None:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        found.setdefault(key, value)


def _take_sampling(found: Rows, inputs: Mapping[str, Json], nodes: Mapping[str, Mapping[str, Json]]) -> None:
    names = {
        "seed": "seed",
        "noise_seed": "seed",
        "steps": "steps",
        "cfg": "guidance_scale",
        "sampler_name": "sampler",
        "scheduler": "scheduler",
    }
    for name, key in names.items():
        _take(found, key, inputs.get(name))
    for name, key in (("positive", "prompt"), ("negative", "negative_prompt")):
        text = _linked_text(inputs.get(name), nodes)
        if text is not None:
            found.setdefault(key, text)


def _linked_text(link: Json, nodes: Mapping[str, Mapping[str, Json]]) -> str | None:
    """Follows links such as ["6", 0] to the first node with a text."""
    for _ in range(16):  # graphs may be circular
        if isinstance(link, str):
            return link
        if not isinstance(link, list) or not link:
            return None
        node = nodes.get(str(link[0]))
        inputs = node.get("inputs") if node else None
        if not isinstance(inputs, Mapping):
            return None
        link = next(
            (inputs[name] for name in ("text", "text_g", "string", "conditioning", "positive") if name in inputs),
            None,
        )
    return None
