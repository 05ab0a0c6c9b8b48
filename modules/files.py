"""The model folders: which files there are, under which names, where, and with which hash."""

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path, PurePosixPath

from modules.errors import ModelFileMissing, NotFound, near_matches
from modules.paths import Paths

logger = logging.getLogger(__name__)

SUFFIXES = (".pth", ".ckpt", ".bin", ".safetensors", ".fooocus.patch")
SHARD = re.compile(r"^(?P<name>.+)-\d{5}-of-\d{5}\.safetensors$")
RESCAN_INTERVAL_S = 1.0
HASH_BLOCK_BYTES = 1 << 20


class Kind(StrEnum):
    """What a model file is for; the value is the word for it in a sentence."""

    CHECKPOINT = "checkpoint"
    LORA = "LoRA"
    VAE = "VAE"
    EMBEDDING = "embedding"
    UPSCALER = "upscaler"
    PREVIEW_DECODER = "preview decoder"
    INPAINT = "inpaint"
    CONTROL = "control"
    CLIP_VISION = "image encoder"
    SAM = "segmentation"
    SAFETY_CHECKER = "safety checker"
    EXPANSION = "prompt expansion"


# Field of Paths that holds the folders of a kind; also the sub-folder of the embedded models.
FOLDERS: Mapping[Kind, str] = {
    Kind.CHECKPOINT: "checkpoints",
    Kind.LORA: "loras",
    Kind.VAE: "vae",
    Kind.EMBEDDING: "embeddings",
    Kind.UPSCALER: "upscale_models",
    Kind.PREVIEW_DECODER: "vae_approx",
    Kind.INPAINT: "inpaint",
    Kind.CONTROL: "controlnet",
    Kind.CLIP_VISION: "clip_vision",
    Kind.SAM: "sam",
    Kind.SAFETY_CHECKER: "safety_checker",
    Kind.EXPANSION: "expansion",
}


class Catalogue:
    """The model files of this machine by kind and name.

    A name is the path below its folder, with "/" on every system: `sub/model.safetensors`. Where two folders
    hold the same name, the first one counts. Shards NAME-00001-of-00003.safetensors are one file,
    NAME.safetensors, whose path need not exist: the loader finds the parts beside it.
    Listings are kept until `refresh`, but a name that is not listed is looked for on the disk again.
    """

    def __init__(self, folders: Mapping[Kind, Iterable[Path]], embedded: Path | None = None) -> None:
        """folders: searched in order, sub-folders included. embedded: the shipped models, listed last."""
        self._folders = {kind: tuple(paths) for kind, paths in folders.items()}
        self._embedded = embedded
        self._listed: dict[Kind, dict[str, Path]] = {}
        self._scanned_at: dict[Kind, float] = {}
        self._changed_at: dict[Kind, dict[Path, int]] = {}

    @classmethod
    def of(cls, paths: Paths) -> "Catalogue":
        """The catalogue of the configured folders."""
        folders = {kind: getattr(paths, name) for kind, name in FOLDERS.items()}
        return cls(
            {kind: found if isinstance(found, tuple) else (found,) for kind, found in folders.items()},
            paths.embedded,
        )

    def names(self, kind: Kind) -> list[str]:
        """Every name of a kind: folder after folder, in each the files before the sub-folders, by letter."""
        return list(self._listing(kind))

    def find(self, kind: Kind, name: str) -> Path | None:
        """The file of a listed name, or None; a back-slash in the name counts as a slash."""
        wanted = name.replace("\\", "/")
        found = self._listing(kind).get(wanted)
        if found is None and time.monotonic() - self._scanned_at[kind] > RESCAN_INTERVAL_S:
            self._scan(kind)
            found = self._listed[kind].get(wanted)
        return found

    def resolve(self, kind: Kind, name: str) -> Path:
        """The file of a listed name.

        Raises:
            ModelFileMissing: no folder of this kind holds it; the message names what looks like it.
        """
        found = self.find(kind, name)
        if found is None:
            raise ModelFileMissing(self._missing(kind, name))
        return found

    def match(self, kind: Kind, text: str) -> str | None:
        """The listed name that a short form means: the name itself, or a stem without folder and suffix."""
        if self.find(kind, text) is not None:
            return text.replace("\\", "/")
        stem = text.replace("\\", "/").casefold()
        return next((name for name in self._listing(kind) if _stem(name).casefold() == stem), None)

    def near(self, kind: Kind, name: str) -> list[str]:
        """Listed names that look like `name`, best first."""
        return near_matches(name, self._listing(kind))

    def refresh(self) -> None:
        """Reads all folders anew."""
        for kind in self._folders:
            self._scan(kind)

    def notice_changes(self) -> None:
        """Reads those folders anew that got or lost an entry since they were read; costs one look at each folder."""
        for kind, folders in list(self._changed_at.items()):
            if any(_changed_at(folder) != at for folder, at in folders.items()):
                self._scan(kind)

    def folder(self, kind: Kind) -> Path:
        """The folder that new files of a kind belong in: the first one."""
        return self._folders[kind][0]

    def with_files(self, kind: Kind, names: Iterable[str]) -> "Catalogue":
        """A catalogue that lists these files as well, as if they were in their folder already."""
        more = Catalogue(self._folders, self._embedded)
        for one in self._folders:
            more._listed[one] = dict(self._listing(one))
            more._scanned_at[one] = float("inf")  # what is promised must not be looked for
        more._listed[kind] |= {name: self.folder(kind) / name for name in names}
        return more

    def _listing(self, kind: Kind) -> dict[str, Path]:
        """Name → path in listed order."""
        if kind not in self._listed:
            self._scan(kind)
        return self._listed[kind]

    def _scan(self, kind: Kind) -> None:
        """Reads the folders of one kind; the new listing replaces the old one at once."""
        listing: dict[str, Path] = {}
        changed_at: dict[Path, int] = {}
        for folder in self._folders.get(kind, ()):
            for name in list_models(folder, changed_at):
                listing.setdefault(name, folder / name)
        if self._embedded is not None:
            for name, path in self._shipped(self._embedded, kind):
                listing.setdefault(name, path)
        self._listed[kind] = listing
        self._changed_at[kind] = changed_at
        self._scanned_at[kind] = time.monotonic()

    def _shipped(self, embedded: Path, kind: Kind) -> Iterator[tuple[str, Path]]:
        """Embedded models: of each kind in its own sub-folder; checkpoints also at the top."""
        folder = embedded / FOLDERS[kind]
        yield from ((name, folder / name) for name in list_models(folder))
        if kind is Kind.CHECKPOINT:
            yield from ((name, embedded / name) for name in list_models(embedded) if "/" not in name)

    def _missing(self, kind: Kind, name: str) -> str:
        """A sentence that says what is missing where, and what is there."""
        folders = " or ".join(str(folder) for folder in self._folders.get(kind, ())) or "any folder"
        near = self.near(kind, name)
        count = len(self._listing(kind))
        hint = f"did you mean {' or '.join(near)}?" if near else f"{count} {'file is' if count == 1 else 'files are'}."
        return f"{name!r} is not in {folders}; {hint}"


def list_models(folder: Path, changed_at: dict[Path, int] | None = None) -> list[str]:
    """Names of the model files below a folder, relative to it; empty for a folder that cannot be read.

    Links to folders are followed, each folder once. Names that start with a dot are left out.

    Args:
        changed_at: gets, for each folder that was read, when its entries changed last, in ns.
    """
    seen: dict[Path, int] = {} if changed_at is None else changed_at
    return list(dict.fromkeys(_walk(folder, PurePosixPath(), set(), seen)))


def _changed_at(folder: Path) -> int:
    """When the folder's entries changed last, in ns; -1 if it does not exist."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1


def _walk(folder: Path, below: PurePosixPath, seen: set[str], changed_at: dict[Path, int]) -> Iterator[str]:
    """Model names of one folder, then those of its sub-folders, each sorted without regard to case."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    changed_at[folder] = _changed_at(folder)  # before reading: what comes in between is noticed next time
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: (entry.name.casefold(), entry.name))
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            logger.warning("Folder %s cannot be read: %s.", folder, error.strerror)
        return
    visible = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in visible:
        if entry.name.lower().endswith(SUFFIXES) and not entry.is_dir():
            yield str(below / _shown_name(entry.name))
    for entry in visible:
        if entry.is_dir():
            yield from _walk(Path(entry.path), below / entry.name, seen, changed_at)


def _shown_name(file_name: str) -> str:
    """The name of a file, or of the whole that a shard is part of."""
    shard = SHARD.match(file_name)
    return f"{shard['name']}.safetensors" if shard else file_name


def _stem(name: str) -> str:
    """A name without folder and suffix."""
    base = name.rpartition("/")[2]
    return next((base[: -len(suffix)] for suffix in SUFFIXES if base.lower().endswith(suffix)), base)


def inside(root: Path, relative: str) -> Path:
    """The existing file that a path from outside names below a folder.

    Raises:
        NotFound: it is not there, not a file, or leads out of the folder, by dots, links or otherwise.
    """
    refused = NotFound(f"There is no file {relative!r}.")
    if not relative or "\\" in relative or "\0" in relative or ":" in relative:
        raise refused
    try:
        path = (root / relative).resolve()
        if path.is_relative_to(root.resolve()) and path.is_file():
            return path
    except (OSError, RuntimeError) as error:
        raise refused from error
    raise refused


class HashCache:
    """SHA-256 of model files, remembered in a file with one JSON object a line.

    An entry counts while size and time of the file are the same; of several, the last.
    """

    def __init__(self, path: Path) -> None:
        """path: of the cache file; it need not exist."""
        self._path = path
        self._known: dict[str, tuple[object, str]] | None = None

    def short(self, model: Path) -> str:
        """The first 10 hex digits of the file's SHA-256, as they are written into metadata.

        A file of several gigabytes takes seconds at the first call: not for the event loop.

        Raises:
            ModelFileMissing: neither the file nor shards of it exist.
        """
        identity = _identity(model)
        known = self._load().get(str(model))
        if known is not None and known[0] == identity:
            return known[1][:10]
        digest = _sha256(model)
        self._remember(model, identity, digest)
        return digest[:10]

    def rebuild(self, models: Iterable[Path], threads: int = 1) -> None:
        """Forgets everything and computes the hashes of the given files."""
        self._known = {}
        self._path.unlink(missing_ok=True)
        with ThreadPoolExecutor(max(1, threads)) as pool:
            list(pool.map(self.short, models))

    def _load(self) -> dict[str, tuple[object, str]]:
        """Path → (identity, digest), read once."""
        if self._known is None:
            self._known = {}
            for line in _lines(self._path):
                try:
                    entry = json.loads(line)
                    self._known[entry["path"]] = (entry["identity"], entry["sha256"])
                except (ValueError, KeyError, TypeError):
                    continue  # of an older program: path and hash, without a way to see that it is stale
        return self._known

    def _remember(self, model: Path, identity: list[list[int]], digest: str) -> None:
        """Adds an entry in memory and, if the disk lets us, in the file."""
        self._load()[str(model)] = (identity, digest)
        line = json.dumps({"path": str(model), "identity": identity, "sha256": digest})
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            logger.warning("%s cannot be written: %s.", self._path.name, error.strerror)


def _parts(model: Path) -> list[Path]:
    """The file, or its shards in order."""
    if model.is_file():
        return [model]
    parts = [
        path
        for path in sorted(model.parent.glob("*.safetensors"))
        if SHARD.match(path.name) and _shown_name(path.name) == model.name
    ]
    if not parts:
        raise ModelFileMissing(f"{model.name!r} is not in {model.parent}.")
    return parts


def _identity(model: Path) -> list[list[int]]:
    """Size in bytes and time in nanoseconds of each part."""
    return [[stat.st_size, stat.st_mtime_ns] for stat in (part.stat() for part in _parts(model))]


def _sha256(model: Path) -> str:
    """The digest over all parts, in hex."""
    digest = hashlib.sha256()
    for part in _parts(model):
        with part.open("rb") as file:
            while block := file.read(HASH_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _lines(path: Path) -> list[str]:
    """The lines of a text file; none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
