"""Reads and writes presets, and lays one under a request.

A preset is a JSON file in `presets/` with the keys of config.txt that Fooocus allows there; its name is the
file's stem.
"""

import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from pydantic import ValidationError

from modules.config import Config, LoraDefault
from modules.errors import FocaleError, InvalidRequest, UnknownName
from modules.request import GenerationRequest

logger = logging.getLogger(__name__)

INITIAL = "initial"
"""The preset that changes nothing: what the server was started with."""

FIELD_OF_KEY: Mapping[str, str] = MappingProxyType(
    {
        "default_model": "base_model_name",
        "default_refiner": "refiner_model_name",
        "default_refiner_switch": "refiner_switch",
        "default_vae": "vae_name",
        "default_loras": "loras",
        "default_cfg_scale": "guidance_scale",
        "default_cfg_tsnr": "adaptive_cfg",
        "default_sample_sharpness": "sharpness",
        "default_sampler": "sampler_name",
        "default_scheduler": "scheduler_name",
        "default_clip_skip": "clip_skip",
        "default_performance": "performance_selection",
        "default_styles": "style_selections",
        "default_aspect_ratio": "aspect_ratios_selection",
        "default_image_number": "image_number",
        "default_prompt": "prompt",
        "default_prompt_negative": "negative_prompt",
        "default_overwrite_step": "overwrite_step",
        "default_overwrite_switch": "overwrite_switch",
        "default_inpaint_engine_version": "inpaint_engine",
        "default_save_metadata_to_images": "save_metadata_to_images",
    }
)
"""Preset key → request field."""

FOLDER_OF_DOWNLOADS: Mapping[str, str] = MappingProxyType(
    {
        "checkpoint_downloads": "checkpoints",
        "lora_downloads": "loras",
        "embeddings_downloads": "embeddings",
        "vae_downloads": "vae",
    }
)
"""Preset key → kind of model folder its files belong in."""

ALLOWED_KEYS: tuple[str, ...] = (
    *FIELD_OF_KEY,
    "previous_default_models",
    "default_loras_min_weight",
    "default_loras_max_weight",
    *FOLDER_OF_DOWNLOADS,
)

OLD_DEFAULT_MODELS: frozenset[str] = frozenset(
    f"{stem}.safetensors"
    for stem in (
        "model",
        "sd_xl_base_1.0",
        "sd_xl_base_1.0_0.9vae",
        "juggernautXL_version6Rundiffusion",
        "juggernautXL_v6Rundiffusion",
        "juggernautXL_version7Rundiffusion",
        "juggernautXL_v7Rundiffusion",
        "juggernautXL_version8Rundiffusion",
        "juggernautXL_v8Rundiffusion",
        "realisticStockPhoto_v10",
        "realisticStockPhoto_v20",
        "bluePencilXL_v009",
        "bluePencilXL_v050",
        "animaPencilXL_v100",
        "animaPencilXL_v200",
        "animaPencilXL_v210",
        "animaPencilXL_v260",
        "animaPencilXL_v300",
        "animaPencilXL_v310",
        "animaPencilXL_v400",
        "animaPencilXL_v500",
        "ponyDiffusionV6XL",
        "playground-v2.5-1024px-aesthetic.fp16",
    )
)
"""Models that releases and presets of Fooocus start with; clients send them without choosing a model."""

_PRESET_NAME = re.compile(r"[^\W_][\w .-]{0,79}")


@dataclass(frozen=True, slots=True)
class Download:
    """A model file a preset names.

    folder: kind of model folder: "checkpoints", "loras", "embeddings" or "vae".
    file: name it is saved under.
    url: where it comes from.
    """

    folder: str
    file: str
    url: str


@dataclass(frozen=True, slots=True)
class Preset:
    """One preset, checked.

    name: the file's stem, or "initial".
    values: preset key → value, of the type config.py gives the key; a key the file lacks is absent.
    problems: what was left out of the file, one sentence each.
    """

    name: str
    values: Mapping[str, object] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def request_fields(self) -> dict[str, object]:
        """Request field → value, only for the keys the preset has."""
        return {name: _as_sent(self.values[key]) for key, name in FIELD_OF_KEY.items() if key in self.values}

    @property
    def downloads(self) -> tuple[Download, ...]:
        """Every file the preset names with its source."""
        return downloads_of({key: self.values.get(key, {}) for key in FOLDER_OF_DOWNLOADS})

    @property
    def previous_models(self) -> tuple[str, ...]:
        """Models that may stand in for the preset's own, best first."""
        return tuple(self.values.get("previous_default_models", ()))  # type: ignore[arg-type]

    def model(self, present: Collection[str], *, always_new: bool = False) -> str | None:
        """The checkpoint to use: the preset's, or a predecessor that is present while the preset's is not.

        Args:
            present: checkpoint files on disk.
            always_new: never use a predecessor.
        Returns:
            None if the preset names no model.
        """
        wanted = self.values.get("default_model")
        if wanted is None or wanted in present or always_new:
            return wanted if wanted is None else str(wanted)
        return next((model for model in self.previous_models if model in present), str(wanted))


def downloads_of(values: Mapping[str, object]) -> tuple[Download, ...]:
    """The files that the four `…_downloads` keys of a preset or of config.txt name, with their sources."""
    return tuple(
        Download(folder, file.replace("\\", "/"), url)
        for key, folder in FOLDER_OF_DOWNLOADS.items()
        for file, url in dict(values.get(key, {})).items()  # type: ignore[call-overload]
    )


class PresetFolder:
    """The presets of a folder; files that changed are read again, the others are not."""

    def __init__(self, folder: Path) -> None:
        """Read nothing yet."""
        self._folder = folder
        self._read: dict[Path, tuple[tuple[int, int], Preset]] = {}

    def presets(self) -> list[Preset]:
        """Every preset that can be read, by name, without "initial"; what cannot is logged once."""
        read: dict[Path, tuple[tuple[int, int], Preset]] = {}
        for path in sorted(self._folder.glob("*.json")) if self._folder.is_dir() else []:
            try:
                status = path.stat()
                stamp = (status.st_mtime_ns, status.st_size)
                known = self._read.get(path)
                read[path] = known if known and known[0] == stamp else (stamp, self._load(path))
            except OSError:
                continue  # removed in this moment
        self._read = read
        return [preset for _stamp, preset in read.values()]

    def predecessors(self) -> dict[str, tuple[str, ...]]:
        """Model → models that may stand in for it, best first, as its preset says."""
        return {
            str(preset.values["default_model"]): preset.previous_models
            for preset in self.presets()
            if preset.previous_models and "default_model" in preset.values
        }

    def _load(self, path: Path) -> Preset:
        try:
            return load_preset(self._folder, path.stem)
        except FocaleError as error:
            logger.warning("%s", error)
            return Preset(path.stem, problems=(str(error),))


def is_old_default(model: str) -> bool:
    """True for a name that means "the default model" while its file is absent."""
    return model in OLD_DEFAULT_MODELS


def preset_names(folder: Path) -> list[str]:
    """Names of all presets: "initial", then the folder's JSON files by name."""
    stems = sorted(path.stem for path in folder.glob("*.json")) if folder.is_dir() else []
    return [INITIAL, *(stem for stem in stems if stem != INITIAL)]


def load_preset(folder: Path, name: str) -> Preset:
    """The preset of that name; "initial" has no values.

    Keys a preset may not hold and values of the wrong kind are left out, logged and listed in `problems`.

    Raises:
        UnknownName: there is none, with the near matches. Only names of files in the folder are known, so a
            name with path parts never is.
        InvalidRequest: the file holds no JSON object.
    """
    names = preset_names(folder)
    if name not in names:
        raise UnknownName("preset", name, names, what="preset")
    if name == INITIAL:
        return Preset(INITIAL)
    path = folder / f"{name}.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise InvalidRequest("preset", f"{path.name} cannot be read as JSON ({error}).", name) from error
    if not isinstance(entries, dict):
        raise InvalidRequest("preset", f"{path.name} must hold a JSON object.", name)
    return read_preset(name, entries)


def read_preset(name: str, entries: Mapping[str, object]) -> Preset:
    """The preset that the entries of a file make; what cannot be used is left out, logged and listed."""
    values: dict[str, object] = {}
    problems: list[str] = []
    for key, entry in entries.items():
        if key not in ALLOWED_KEYS:
            problems.append(f"{key} is ignored: a preset cannot set it.")
            continue
        try:
            values[key] = getattr(Config.model_validate({key: entry}), key)
        except ValidationError as error:
            problems.append(f"{key} = {entry!r} is ignored: {error.errors()[0]['msg']}.")
    for problem in problems:
        logger.warning("Preset %s: %s", name, problem)
    return Preset(name, MappingProxyType(values), tuple(problems))


def apply_preset(request: GenerationRequest, preset: Preset, *, defaults: GenerationRequest) -> GenerationRequest:
    """The request with the preset's values where the caller decided nothing.

    A field the caller sent stays, unless its value equals the default: then the preset wins, because clients
    send every field (published rule). Keys the preset lacks leave their fields alone.

    Args:
        request: as it came in; `model_fields_set` are the fields that were sent.
        preset: what to lay under it.
        defaults: a request in which nothing was sent, under the server's settings.
    Raises:
        pydantic.ValidationError: a value of the preset is outside the field's range.
    """
    values = {
        name: value
        for name, value in preset.request_fields.items()
        if name not in request.model_fields_set or getattr(request, name) == getattr(defaults, name)
    }
    return request.changed(**values) if values else request


def preset_entries(request: GenerationRequest) -> dict[str, object]:
    """The request as the entries of a preset file: every key that has a field, JSON values."""
    sent = request.model_dump(mode="json")
    entries = {key: sent[name] for key, name in FIELD_OF_KEY.items()}
    entries["default_loras"] = [[row["enabled"], row["model_name"], row["weight"]] for row in sent["loras"]]
    return entries


def save_preset(folder: Path, name: str, entries: Mapping[str, object], *, replace: bool = False) -> Path:
    """Writes a preset file and returns its path; a crash leaves the old file or the new one, never a half.

    Args:
        folder: the presets folder, made if it is missing.
        name: letters, digits, space, `.`, `_`, `-`; at most 80 characters, a letter or digit first.
        entries: preset key → JSON value.
        replace: whether a preset of that name may be overwritten.
    Raises:
        InvalidRequest: the name cannot be used, or is taken.
    """
    if not _PRESET_NAME.fullmatch(name) or name != name.strip() or name.casefold() == INITIAL:
        raise InvalidRequest("preset", f"{name!r} is no usable name; take letters, digits, '_' and '-'.", name)
    path = folder / f"{name}.json"
    if path.exists() and not replace:
        raise InvalidRequest("preset", f"there is a preset {name!r} already.", name)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{name}.json.part"
    unfinished.write_text(json.dumps(dict(entries), indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _as_sent(value: object) -> object:
    """A checked value in the form a request takes."""
    if isinstance(value, tuple) and all(isinstance(row, LoraDefault) for row in value):
        return [row._asdict() for row in value]
    return list(value) if isinstance(value, tuple) else value
