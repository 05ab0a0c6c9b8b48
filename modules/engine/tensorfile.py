"""Model files as named tensors: shapes from the header alone, values on demand, shards as one file."""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import safe_open
from torch import Tensor

from modules.errors import ModelFileMissing, ModelFileUnusable

PICKLE_SUFFIXES = (".ckpt", ".pth", ".pt", ".bin")
SHARD = re.compile(r"^(?P<name>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.safetensors$")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself

Identity = tuple[tuple[str, int, int], ...]  # one (path, bytes, mtime_ns) per part of a file


class TensorFile(Protocol):
    """A model file that tells its shapes without reading its tensors."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    def read(self, key: str) -> Tensor:
        """The tensor of this name on the CPU, a view of the mapped file: never write into it."""
        ...


def shard_parts(path: Path) -> list[Path]:
    """The files that hold the checkpoint `path`: itself, or its shards NAME-00001-of-0000N in order.

    Raises:
        ModelFileMissing: neither the file nor all of its shards exist.
    """
    if path.is_file():
        return [path]
    stem = path.name.removesuffix(".safetensors")
    found = sorted(
        (part for part in path.parent.glob(f"{_glob_literal(stem)}-*-of-*.safetensors") if SHARD.match(part.name)),
        key=lambda part: part.name,
    )
    if not found:
        raise ModelFileMissing(f"{path.name!r} is not in {path.parent}.")
    count = int(cast(re.Match[str], SHARD.match(found[0].name))["count"])
    wanted = [path.with_name(f"{stem}-{index:05d}-of-{count:05d}.safetensors") for index in range(1, count + 1)]
    missing = [part.name for part in wanted if not part.is_file()]
    if missing:
        raise ModelFileMissing(f"{path.name!r} is incomplete: {', '.join(missing)} is missing beside the other shards.")
    return wanted


def _glob_literal(text: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", text)


def file_identity(path: Path) -> Identity:
    """What tells the contents of model files apart without reading them: path, size, time of each part."""
    stats = [(part, part.stat()) for part in shard_parts(path)]
    return tuple((str(part.resolve()), stat.st_size, stat.st_mtime_ns) for part, stat in stats)


def open_tensor_file(path: Path) -> TensorFile:
    """Opens a safetensors file (or its shards), or a torch file whose pickle holds tensors only.

    Raises:
        ModelFileMissing: the file or one of its shards does not exist.
        ModelFileUnusable: truncated, not a model file, or a pickle with anything but tensors in it.
    """
    parts = shard_parts(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return PickledTensors(path)
    return Safetensors(path, parts)


@dataclass(frozen=True)
class Header:
    """The header of one safetensors file: shape of every tensor, and the free metadata strings."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Reads the header of a safetensors file and checks that the file is as long as the header says.

    Raises:
        ModelFileUnusable: not a safetensors file, or truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= MAX_HEADER_BYTES:
            pickled = start.startswith((b"PK\x03\x04", b"\x80"))
            hint = " but a pickle; convert it, or give it its true suffix .ckpt" if pickled else ""
            raise ModelFileUnusable(f"{path.name!r} is not a safetensors file{hint}.")
        if 8 + length > size:
            raise _truncated(path, size, 8 + length)
        text = file.read(length)
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelFileUnusable(f"{path.name!r} has a damaged safetensors header.") from error
    if 8 + length + end > size:
        raise _truncated(path, size, 8 + length + end)
    return Header(shapes, metadata)


def _truncated(path: Path, size: int, expected: int) -> ModelFileUnusable:
    return ModelFileUnusable(
        f"{path.name!r} is truncated: it has {size:,} bytes and should have {expected:,}; download it again."
    )


class Safetensors:
    """One safetensors file, or several shards read as one; tensors are views of the memory-mapped file."""

    def __init__(self, path: Path, parts: list[Path]) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._part_of: dict[str, Path] = {}
        self._open: dict[Path, object] = {}
        for part in parts:
            header = read_header(part)
            self.metadata |= header.metadata
            self.shapes |= header.shapes
            self._part_of |= dict.fromkeys(header.shapes, part)

    def read(self, key: str) -> Tensor:
        part = self._part_of[key]
        if part not in self._open:
            self._open[part] = safe_open(str(part), framework="pt", device="cpu")
        handle = self._open[part]
        return cast(Tensor, handle.get_tensor(key))  # type: ignore[attr-defined]  # safetensors ships no types


class PickledTensors:
    """A .ckpt, .pt, .pth or .bin file, read by torch's weights-only unpickler and memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        self._tensors = _load_pickle(path)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, key: str) -> Tensor:
        return self._tensors[key]


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # the unpickler raises a dozen types; all mean the same
        raise ModelFileUnusable(
            f"{path.name!r} cannot be read as tensors only: it is damaged, or its pickle holds other "
            "objects; use a .safetensors version of it."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    flat = dict(_flatten(content)) if isinstance(content, dict) else {}
    if not flat:
        raise ModelFileUnusable(f"{path.name!r} holds no named tensors.")
    return flat


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _flatten(content: Mapping[object, object], prefix: str = "") -> list[tuple[str, Tensor]]:
    """Names and tensors of nested dicts, names joined by dots."""
    flat: list[tuple[str, Tensor]] = []
    for key, value in content.items():
        if isinstance(value, Tensor):
            flat.append((f"{prefix}{key}", value.detach()))
        elif isinstance(value, Mapping):
            flat.extend(_flatten(value, f"{prefix}{key}."))
    return flat
