"""Generation parameters as text: the rows of a finished picture, in the Fooocus JSON and the A1111 scheme."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

from modules.choices import (
    DEFAULT_VAE,
    NO_MODEL,
    MetadataScheme,
    RefinerSwapMethod,
    SamplerName,
    SchedulerName,
)

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"

DEFAULT_ADAPTIVE_CFG: Final = 7.0
REQUEST_KEY: Final = "focale"  # key of the complete request in JSON texts
REQUEST_ITEM: Final = "Focale request"  # item of the complete request in A1111 texts
MODEL_SUFFIXES: Final = (".fooocus.patch", ".safetensors", ".ckpt", ".pth", ".bin", ".pt")

A1111_SAMPLERS: Final[Mapping[SamplerName, str]] = MappingProxyType(
    {
        SamplerName.EULER: "Euler",
        SamplerName.EULER_ANCESTRAL: "Euler a",
        SamplerName.HEUN: "Heun",
        SamplerName.DPM_2: "DPM2",
        SamplerName.DPM_2_ANCESTRAL: "DPM2 a",
        SamplerName.LMS: "LMS",
        SamplerName.DPM_FAST: "DPM fast",
        SamplerName.DPM_ADAPTIVE: "DPM adaptive",
        SamplerName.DPMPP_2S_ANCESTRAL: "DPM++ 2S a",
        SamplerName.DPMPP_SDE: "DPM++ SDE",
        SamplerName.DPMPP_SDE_GPU: "DPM++ SDE",
        SamplerName.DPMPP_2M: "DPM++ 2M",
        SamplerName.DPMPP_2M_SDE: "DPM++ 2M SDE",
        SamplerName.DPMPP_2M_SDE_GPU: "DPM++ 2M SDE",
        SamplerName.LCM: "LCM",
        SamplerName.TCD: "TCD",
        SamplerName.RESTART: "Restart",
        SamplerName.DDIM: "DDIM",
        SamplerName.UNI_PC: "UniPC",
    }
)
"""Sampler names as A1111 shows them; the others keep their own name."""

_NEVER_KARRAS: Final = frozenset({"Euler", "Euler a", "Heun", "DPM fast", "DPM adaptive", "DDIM", "UniPC"})


@dataclass(frozen=True, slots=True)
class LoraFact:
    """A LoRA that was merged for the run.

    name: file name below the LoRA folders.  weight: multiplier.  hash: first 10 hex digits of the file's
    SHA-256, "" when not known.
    """

    name: str
    weight: float
    hash: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a picture's parameter table: what people read, what programs read, and the value."""

    label: str
    key: str
    value: Json


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What made one picture: effective values, after the performance mode and all overwrites.

    prompt, negative_prompt: the user's text after wildcards, lines joined by newline.
    full_prompt, full_negative_prompt: every fragment that was encoded (styles, extra lines, expansion).
    steps: model evaluations asked of the sampler.  width, height: sampling size in pixels.
    adm_guidance: positive scaler, negative scaler, end.  freeu: b1, b2, s1, s2, or None when off.
    base_model, refiner_model, vae: file names below their folders; "None", "Default (model)" as on the page.
    *_hash: first 10 hex digits of the file's SHA-256, "" when not known.
    overwrite_switch: forced refiner switch step, 0 or less when not forced.
    seed: of this very picture.  loras: inline and performance LoRAs included.
    extra: further rows (vary, upscale, inpaint, image prompts), shown after the seed.
    request: the complete resolved request in wire names, or None to leave it out.
    """

    prompt: str
    negative_prompt: str
    prompt_expansion: str
    styles: tuple[str, ...]
    performance: str
    steps: int
    width: int
    height: int
    guidance_scale: float
    sharpness: float
    adm_guidance: tuple[float, float, float]
    base_model: str
    sampler: str
    scheduler: str
    seed: int
    refiner_switch: float
    base_model_hash: str = ""
    refiner_model: str = NO_MODEL
    refiner_model_hash: str = ""
    overwrite_switch: float = -1
    refiner_swap_method: str = RefinerSwapMethod.JOINT
    adaptive_cfg: float = DEFAULT_ADAPTIVE_CFG
    clip_skip: int = 2
    vae: str = DEFAULT_VAE
    freeu: tuple[float, float, float, float] | None = None
    loras: tuple[LoraFact, ...] = ()
    full_prompt: tuple[str, ...] = ()
    full_negative_prompt: tuple[str, ...] = ()
    extra: tuple[Row, ...] = ()
    created_by: str = ""
    version: str = "Focale"
    request: Mapping[str, Json] | None = None


def rows(facts: RunFacts, scheme: MetadataScheme | None) -> tuple[Row, ...]:
    """The parameter table of a picture, in the order and under the keys of Fooocus' log.

    scheme: how the parameters were written into the file; None when they were not (shown as False).
    """
    has_refiner = facts.refiner_model not in ("", NO_MODEL)
    table: list[tuple[bool, str, str, Json]] = [
        (True, "Prompt", "prompt", facts.prompt),
        (True, "Negative Prompt", "negative_prompt", facts.negative_prompt),
        (True, "Fooocus V2 Expansion", "prompt_expansion", facts.prompt_expansion),
        (True, "Styles", "styles", str(list(map(str, facts.styles)))),
        (True, "Performance", "performance", str(facts.performance)),
        (True, "Steps", "steps", facts.steps),
        (True, "Resolution", "resolution", str((facts.width, facts.height))),
        (True, "Guidance Scale", "guidance_scale", facts.guidance_scale),
        (True, "Sharpness", "sharpness", facts.sharpness),
        (True, "ADM Guidance", "adm_guidance", str(tuple(facts.adm_guidance))),
        (True, "Base Model", "base_model", facts.base_model),
        (True, "Refiner Model", "refiner_model", facts.refiner_model or NO_MODEL),
        (True, "Refiner Switch", "refiner_switch", facts.refiner_switch),
        (
            has_refiner and facts.overwrite_switch > 0,
            "Overwrite Switch", "overwrite_switch", facts.overwrite_switch,
        ),
        (
            has_refiner and facts.refiner_swap_method != RefinerSwapMethod.JOINT,
            "Refiner Swap Method", "refiner_swap_method", str(facts.refiner_swap_method),
        ),
        (
            facts.adaptive_cfg != DEFAULT_ADAPTIVE_CFG,
            "CFG Mimicking from TSNR", "adaptive_cfg", facts.adaptive_cfg,
        ),
        (facts.clip_skip > 1, "CLIP Skip", "clip_skip", facts.clip_skip),
        (True, "Sampler", "sampler", str(facts.sampler)),
        (True, "Scheduler", "scheduler", str(facts.scheduler)),
        (True, "VAE", "vae", facts.vae),
        (True, "Seed", "seed", str(facts.seed)),
        (facts.freeu is not None, "FreeU", "freeu", str(facts.freeu)),
    ]  # fmt: skip
    found = [Row(label, key, value) for shown, label, key, value in table if shown]
    found += facts.extra
    found += [
        Row(f"LoRA {number}", f"lora_combined_{number}", f"{lora.name} : {lora.weight}")
        for number, lora in enumerate(facts.loras, start=1)
    ]
    found.append(Row("Metadata Scheme", "metadata_scheme", str(scheme) if scheme else False))
    found.append(Row("Version", "version", facts.version))
    return tuple(found)


def clipboard_values(facts: RunFacts, scheme: MetadataScheme | None) -> dict[str, Json]:
    """The JSON object the log page copies: the rows by key, and the complete request under `focale`."""
    values = {row.key: row.value for row in rows(facts, scheme)}
    if facts.request is not None:
        values[REQUEST_KEY] = facts.request
    return values


def parameters_text(facts: RunFacts, scheme: MetadataScheme, *, with_request: bool) -> str:
    """The text that goes into a file; `with_request` adds the complete request as one more item."""
    if scheme is MetadataScheme.A1111:
        return _a1111_text(facts, with_request=with_request)
    return _fooocus_text(facts, with_request=with_request)


def model_stem(name: str) -> str:
    """A model's name without folder and suffix, as both schemes store it."""
    stem = name.replace("\\", "/").rsplit("/", 1)[-1]
    for suffix in MODEL_SUFFIXES:
        if stem.lower().endswith(suffix):
            return stem[: -len(suffix)]
    return stem


def request_json(request: Mapping[str, Json]) -> str:
    """A request as compact ASCII JSON, so that no file format can damage its letters."""
    return json.dumps(request, separators=(",", ":"), ensure_ascii=True)


def _fooocus_text(facts: RunFacts, *, with_request: bool) -> str:
    values: dict[str, Json] = {
        row.key: row.value for row in rows(facts, MetadataScheme.FOOOCUS) if not row.key.startswith("lora_combined_")
    }
    values["base_model"] = model_stem(facts.base_model)
    values["base_model_hash"] = facts.base_model_hash
    values["refiner_model"] = model_stem(facts.refiner_model or NO_MODEL)
    if values["refiner_model"] != NO_MODEL:
        values["refiner_model_hash"] = facts.refiner_model_hash
    values["vae"] = model_stem(facts.vae)
    values["full_prompt"] = list(facts.full_prompt)
    values["full_negative_prompt"] = list(facts.full_negative_prompt)
    values["loras"] = [[model_stem(lora.name), lora.weight, lora.hash] for lora in facts.loras]
    for number, lora in enumerate(facts.loras, start=1):
        values[f"lora_combined_{number}"] = f"{model_stem(lora.name)} : {lora.weight}"
    if facts.created_by:
        values["created_by"] = facts.created_by
    if with_request and facts.request is not None:
        values[REQUEST_KEY] = facts.request
    return json.dumps(dict(sorted(values.items())))


def _a1111_text(facts: RunFacts, *, with_request: bool) -> str:
    lines = [", ".join(facts.full_prompt or (facts.prompt,))]
    negative = ", ".join(facts.full_negative_prompt or (facts.negative_prompt,))
    if negative:
        lines.append(f"Negative prompt: {negative}")
    items = _a1111_items(facts)
    if with_request and facts.request is not None:
        items[REQUEST_ITEM] = request_json(facts.request)
    lines.append(", ".join(f"{label}: {_quoted_if_needed(value)}" for label, value in items.items()))
    return "\n".join(lines)


def _a1111_items(facts: RunFacts) -> dict[str, str]:
    items: dict[str, str] = {
        "Steps": str(facts.steps),
        "Sampler": _a1111_sampler(facts.sampler, facts.scheduler),
        "Seed": str(facts.seed),
        "Size": f"{facts.width}x{facts.height}",
        "CFG scale": str(facts.guidance_scale),
        "Sharpness": str(facts.sharpness),
        "ADM Guidance": str(tuple(facts.adm_guidance)),
        "Model": model_stem(facts.base_model),
        "Model hash": facts.base_model_hash,
        "Performance": str(facts.performance),
        "Scheduler": str(facts.scheduler),
        "VAE": model_stem(facts.vae),
        "Raw prompt": facts.prompt,
        "Raw negative prompt": facts.negative_prompt,
    }
    if facts.refiner_model not in ("", NO_MODEL):
        items |= {"Refiner": model_stem(facts.refiner_model), "Refiner hash": facts.refiner_model_hash}
    items |= _a1111_optional_items(facts)
    if facts.loras:
        items["Lora hashes"] = ", ".join(f"{model_stem(lora.name)}: {lora.hash}" for lora in facts.loras)
        items["Lora weights"] = ", ".join(f"{model_stem(lora.name)}: {lora.weight}" for lora in facts.loras)
    items["Styles"] = str(list(map(str, facts.styles)))
    items["Version"] = facts.version
    if facts.created_by:
        items["User"] = facts.created_by
    return items


def _a1111_optional_items(facts: RunFacts) -> dict[str, str]:
    labels = {
        "adaptive_cfg": "Adaptive CFG",
        "clip_skip": "Clip skip",
        "overwrite_switch": "Overwrite Switch",
        "refiner_swap_method": "Refiner Swap Method",
        "refiner_switch": "Refiner Switch",
        "freeu": "FreeU",
        "prompt_expansion": "Expansion",
    }
    values = {row.key: row.value for row in rows(facts, MetadataScheme.A1111)}
    found = {label: str(values[key]) for key, label in labels.items() if key in values and values[key] != ""}
    return found | {row.label: str(row.value) for row in facts.extra}


def _a1111_sampler(sampler: str, scheduler: str) -> str:
    shown = {str(name): label for name, label in A1111_SAMPLERS.items()}.get(str(sampler))
    if shown is None:
        return str(sampler)
    if scheduler == SchedulerName.KARRAS and shown not in _NEVER_KARRAS:
        return f"{shown} Karras"
    return shown


def _quoted_if_needed(value: str) -> str:
    plain = value.isprintable() and value == value.strip() and not any(mark in value for mark in ',:"')
    return value if plain else json.dumps(value, ensure_ascii=not value.isprintable())
