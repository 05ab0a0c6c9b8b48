"""Writes finished pictures into the output folder: names, formats, embedded parameters, never half a file."""

import errno
import os
import random
import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, TypeAlias

from PIL import Image

from modules.choices import OutputFormat
from modules.errors import StorageFull
from modules.files_atomic import PARTIAL_SUFFIX, sync_folder
from modules.images import FILE_FORMATS, FileFormat, flatten
from modules.metadata_files import Embedding, save_arguments

MAX_SAVE_NAME: Final = 120  # characters
MAX_SAVE_NAME_BYTES: Final = 200  # file systems allow 255 bytes; index, clash number and suffixes need the rest
NO_SAVE_NAME: Final = frozenset({"", "none"})

_WINDOWS_DEVICE: Final = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SavedImage:
    """A picture on disk.

    path: relative to the output folder, with forward slashes (`2026-01-31/2026-01-31_12-00-00_1234.png`).
    file: absolute path.  size_bytes: of the file.  width, height: pixels.
    """

    path: str
    file: Path
    size_bytes: int
    width: int
    height: int


def save_image(
    image: Image.Image,
    *,
    root: Path,
    output_format: OutputFormat | str,
    now: datetime,
    index: int = 0,
    save_name: str | None = None,
    embedding: Embedding | None = None,
) -> SavedImage:
    """Writes a picture below `root/YYYY-MM-DD/` and returns where it is.

    The file appears under its name only when it is complete and on the disk: it is written as a hidden
    `.part` file, flushed, then renamed. An existing file is never overwritten.

    Args:
        image: any mode; alpha is composited on white for JPEG.
        root: the output folder, or the temporary folder for pictures that shall not be kept.
        output_format: png, jpg, jpeg or webp; jpg and jpeg differ in the suffix only. Quality is 95.
        now: local time of the picture.
        index: 0-based number of the picture within its task, used with `save_name`.
        save_name: the wish of the request; None, "" and "none" mean a dated name.
        embedding: what to write into the file, or None for no metadata at all.
    Raises:
        StorageFull: the disk is full or the folder cannot be written.
    """
    suffix = str(output_format)
    folder = root / now.strftime("%Y-%m-%d")
    wish = clean_save_name(save_name)
    stems = dated_stems(now) if wish is None else clash_stems(f"{wish}-{index}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        target = _write(image, folder, stems, suffix, _encoder_arguments(FILE_FORMATS[suffix], embedding))
        size_bytes = target.stat().st_size
    except OSError as error:
        raise StorageFull(f"The picture could not be written to {str(folder)!r}: {error}.") from error
    relative = target.relative_to(root).as_posix()
    return SavedImage(relative, target, size_bytes, image.width, image.height)


def clean_save_name(save_name: str | None) -> str | None:
    """The wished name as a safe file stem, or None when a dated name is to be used.

    Letters (of any script), digits, space, `.`, `_` and `-` stay, others become `_`; no leading dot; at most
    120 characters and 200 bytes of UTF-8; names of Windows devices get a leading `_`.
    """
    if save_name is None or save_name.strip().lower() in NO_SAVE_NAME:
        return None
    text = unicodedata.normalize("NFC", save_name.strip())
    kept = "".join(char if char.isalnum() or char in " ._-" else "_" for char in text)
    kept = kept.lstrip(". ")[:MAX_SAVE_NAME]
    kept = kept.encode("utf-8")[:MAX_SAVE_NAME_BYTES].decode("utf-8", "ignore").rstrip()
    if not kept:
        return None
    return f"_{kept}"[:MAX_SAVE_NAME] if _WINDOWS_DEVICE.match(kept) else kept


def dated_stems(now: datetime) -> Iterator[str]:
    """`YYYY-MM-DD_HH-MM-SS_NNNN` with a random start from 1000 to 9999, then every other number once."""
    first = random.SystemRandom().randrange(9000)
    for step in range(9000):
        yield f"{now:%Y-%m-%d_%H-%M-%S}_{1000 + (first + step) % 9000}"


def clash_stems(stem: str) -> Iterator[str]:
    """`stem`, then `stem_1`, `stem_2` and so on."""
    yield stem
    for number in range(1, 100_000):
        yield f"{stem}_{number}"


def remove_partial_files(root: Path) -> int:
    """Deletes what killed writers left below `root`; to be called when no writer runs. Returns how many."""
    count = 0
    for partial in root.glob(f"*/.*{PARTIAL_SUFFIX}"):
        with suppress(OSError):
            partial.unlink()
            count += 1
    return count


_EncoderArguments: TypeAlias = dict[str, object]


def _encoder_arguments(file_format: FileFormat, embedding: Embedding | None) -> _EncoderArguments:
    arguments: _EncoderArguments = {"format": file_format}
    if file_format == "JPEG":
        arguments |= {"quality": 95, "optimize": True, "progressive": True}
    elif file_format == "WEBP":
        arguments |= {"quality": 95, "lossless": False}
    else:
        arguments["compress_level"] = 4  # as small as Pillow's 6 for pictures of this kind, and a tenth faster
    if embedding is not None:
        arguments |= save_arguments(embedding, file_format)
    return arguments


def _write(image: Image.Image, folder: Path, stems: Iterator[str], suffix: str, arguments: _EncoderArguments) -> Path:
    """Writes under the first free name; the partial file, created exclusively, is the claim on the name."""
    if arguments["format"] == "JPEG":
        image = flatten(image)
    for stem in stems:
        target = folder / f"{stem}.{suffix}"
        partial = folder / f".{target.name}{PARTIAL_SUFFIX}"
        if target.exists():
            continue
        try:
            stream = partial.open("xb")
        except FileExistsError:
            continue
        try:
            with stream:
                if target.exists():  # written between the look and the claim
                    partial.unlink()
                    continue
                image.save(stream, **arguments)  # type: ignore[arg-type]
                stream.flush()
                os.fsync(stream.fileno())
            os.rename(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_folder(folder)
        return target
    raise OSError(errno.EEXIST, "every possible name is taken", str(folder))
