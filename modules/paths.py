"""Where things are: the folders that flags, environment and config.txt name, or their defaults."""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from modules.config import Layer, environment_values
from modules.errors import SettingsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Paths:
    """Folders and files; all absolute. The model folders are searched in order, sub-folders included.

    embedded: the models that ship with the program, listed after the user's own.
    """

    root: Path
    config: Path
    config_example: Path
    checkpoints: tuple[Path, ...]
    loras: tuple[Path, ...]
    embeddings: Path
    vae_approx: Path
    vae: Path
    upscale_models: Path
    inpaint: Path
    controlnet: Path
    clip_vision: Path
    expansion: Path
    wildcards: Path
    safety_checker: Path
    sam: Path
    outputs: Path
    temp: Path
    inputs: Path
    presets: Path
    embedded: Path
    hash_cache: Path


# Path keys of config.txt: field of Paths, folder below the program.
PATH_KEYS: Mapping[str, tuple[str, str]] = {
    "path_checkpoints": ("checkpoints", "models/checkpoints"),
    "path_loras": ("loras", "models/loras"),
    "path_embeddings": ("embeddings", "models/embeddings"),
    "path_vae_approx": ("vae_approx", "models/vae_approx"),
    "path_vae": ("vae", "models/vae"),
    "path_upscale_models": ("upscale_models", "models/upscale_models"),
    "path_inpaint": ("inpaint", "models/inpaint"),
    "path_controlnet": ("controlnet", "models/controlnet"),
    "path_clip_vision": ("clip_vision", "models/clip_vision"),
    "path_fooocus_expansion": ("expansion", "models/prompt_expansion/fooocus_expansion"),
    "path_wildcards": ("wildcards", "wildcards"),
    "path_safety_checker": ("safety_checker", "models/safety_checker"),
    "path_sam": ("sam", "models/sam"),
    "path_outputs": ("outputs", "outputs"),
}
SEVERAL_FOLDERS = ("path_checkpoints", "path_loras")


def config_path(env: Mapping[str, str], root: Path) -> Path:
    """Where config.txt is."""
    return root / Path(env.get("config_path", "config.txt")).expanduser()


def read_paths(
    output_path: str | None,
    temp_path: str | None,
    layers: Iterable[Layer],
    env: Mapping[str, str],
    root: Path,
    problems: list[str],
) -> Paths:
    """The folders: flags first, then the environment, the layers, and the defaults below the program.

    Sentences about folders that cannot be used go to `problems`.
    """
    values = {key: value for _, layer in reversed(list(layers)) for key, value in layer.items()}
    values |= environment_values(env, [*PATH_KEYS, "temp_path"])
    folders = {
        name: _folders(key, values.get(key), root, default, problems) for key, (name, default) in PATH_KEYS.items()
    }
    several = {PATH_KEYS[key][0] for key in SEVERAL_FOLDERS}
    single: dict[str, Path] = {name: found[0] for name, found in folders.items() if name not in several}
    if output_path:
        single["outputs"] = Path(output_path).expanduser().resolve()
    return Paths(
        root=root,
        config=config_path(env, root),
        config_example=root / Path(env.get("config_example_path", "config_modification_tutorial.txt")).expanduser(),
        checkpoints=folders["checkpoints"],
        loras=folders["loras"],
        **single,
        temp=_temp_folder(temp_path, values.get("temp_path"), root),
        inputs=root / "inputs",
        presets=root / "presets",
        embedded=root / "models" / "embedded",
        hash_cache=root / "hash_cache.txt",
    )


def _folders(key: str, value: object, root: Path, default: str, problems: list[str]) -> tuple[Path, ...]:
    """The existing folders a path key names, or its default; an output folder need not exist yet."""
    wanted = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    texts = [text for text in wanted if isinstance(text, str) and text.strip()]
    if value not in (None, "", []) and len(texts) != len(wanted or [value]):
        problems.append(f"{key} = {value!r} is ignored: a folder or a list of folders is expected.")
        texts = []
    found = [(root / Path(text).expanduser()).resolve() for text in texts]
    present = [path for path in found if path.is_dir() or key == "path_outputs" or path == (root / default).resolve()]
    problems += [
        f"{key}: folder {str(path)!r} does not exist; it is left out." for path in found if path not in present
    ]
    if key not in SEVERAL_FOLDERS:
        present = present[:1]
    return tuple(present) or ((root / default).resolve(),)


def _temp_folder(flag: str | None, value: object, root: Path) -> Path:
    """The folder of temporary files.

    Not Fooocus' own: that one is emptied at its start, and at ours.
    """
    if flag:
        return Path(flag).expanduser().resolve()
    if isinstance(value, str) and value:
        return (root / Path(value).expanduser()).resolve()
    return Path(tempfile.gettempdir()) / "focale"


def make_folders(paths: Paths) -> None:
    """Makes every folder that is missing."""
    several = [*paths.checkpoints, *paths.loras]
    single = [getattr(paths, name) for name, _ in PATH_KEYS.values() if name not in ("checkpoints", "loras")]
    for folder in [*several, *single, paths.temp]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"Folder {str(folder)!r} cannot be made: {error.strerror}.") from error


def path_values(paths: Paths) -> dict[str, object]:
    """The path keys of config.txt with the folders in use."""
    names = {key: name for key, (name, _) in PATH_KEYS.items()} | {"temp_path": "temp"}
    return {key: _as_text(getattr(paths, name)) for key, name in names.items()}


def _as_text(value: Path | tuple[Path, ...]) -> str | list[str]:
    """A folder or several as JSON holds them."""
    return [str(path) for path in value] if isinstance(value, tuple) else str(value)
