"""Pictures that come in: from text, bytes, URLs and files to plain RGB or grey, and to bytes again."""

import base64
import binascii
import hashlib
import io
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias
from urllib.parse import unquote, urlsplit

from PIL import Image, ImageOps, UnidentifiedImageError

from modules.errors import FetchRefused, InvalidRequest, NotFound, StorageFull, UnreadableImage
from modules.files_atomic import write_atomically
from modules.params import is_no_image

MAX_IMAGE_BYTES: Final = 50 * 2**20
MAX_IMAGE_PIXELS: Final = 64 * 10**6
READABLE_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
PREVIEW_SIDE_PX: Final = 512
INPUT_FOLDER: Final = "inputs"

FileFormat: TypeAlias = Literal["PNG", "JPEG", "WEBP"]
FILE_FORMATS: Final[dict[str, FileFormat]] = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
MEDIA_TYPES: Final[dict[str, str]] = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
}

Field: TypeAlias = str | tuple[str | int, ...]
Fetch: TypeAlias = Callable[[str], bytes]

_WAY_OUT: Final = "Send a PNG, JPEG, WebP, GIF or BMP picture as an http(s) URL, a data URI or base64."
_STORED_INPUT: Final = re.compile(rf"/?({INPUT_FOLDER}/[0-9a-f]{{64}}\.png)")
UNREADABLE: Final = (
    OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, ZeroDivisionError,
    OverflowError, MemoryError, struct.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ImageSources:
    """Where picture values may lead.

    output_root: the output folder; own URLs and `inputs/….png` values are read from it.
    own_bases: bases of our own URLs (`http://127.0.0.1:7866`), read from disk instead of over HTTP.
    fetch: gets the bytes of any other URL and raises FetchRefused, see fetch.py; None refuses URLs.
    """

    output_root: Path | None = None
    own_bases: Sequence[str] = ()
    fetch: Fetch | None = None


NO_SOURCES: Final = ImageSources()


def read_image(
    value: str | bytes | Path | Image.Image | None,
    *,
    field: Field,
    sources: ImageSources = NO_SOURCES,
    as_mask: bool = False,
) -> Image.Image | None:
    """The picture a request value stands for, or None where it stands for no picture.

    Text is "no image" (None, "", `None`, `null`, `string`), an http(s) URL, a data URI, a path of a stored
    input (`inputs/<sha256>.png`), or bare base64 (line breaks, missing padding and the URL-safe alphabet are
    tolerated). Blocks while it fetches and decodes: call it from a thread.

    Args:
        field: wire name of the value, for errors.
        as_mask: read as grey (`L`, transparent is black) instead of `RGB` (transparent is white).
    Raises:
        UnreadableImage: not a picture, too large, or not to be had; the message says which and what to do.
    """
    if isinstance(value, Image.Image):
        _check_size(value.size, field)
        return _plain(value, as_mask=as_mask)
    if isinstance(value, str) or value is None:
        if value is None or is_no_image(value):
            return None
        value = bytes_of_text(value.strip(), field=field, sources=sources)
    if isinstance(value, Path):
        value = _read_file(value, field)
    return decode(value, field=field, as_mask=as_mask)


def decode(content: bytes, *, field: Field, as_mask: bool = False) -> Image.Image:
    """An encoded picture as `RGB` (or `L` for masks), upright, its first frame only.

    EXIF orientation is applied; palette, 16-bit, alpha and CMYK pictures are converted.

    Raises:
        UnreadableImage: not one of the readable formats, damaged, over 50 MiB or over 64 megapixels.
    """
    if len(content) > MAX_IMAGE_BYTES:
        raise UnreadableImage(field, f"The picture has {_mib(len(content))}; at most 50 MiB are accepted.")
    if not content:
        raise UnreadableImage(field, f"The picture is empty. {_WAY_OUT}")
    try:
        with Image.open(io.BytesIO(content), formats=READABLE_FORMATS) as opened:
            _check_size(opened.size, field)
            opened.load()
            return _plain(opened, as_mask=as_mask)
    except InvalidRequest:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImage(field, "The picture has more than 64 megapixels.") from None
    except UNREADABLE as error:
        reason = "It is not a picture" if isinstance(error, UnidentifiedImageError) else "It is damaged"
        raise UnreadableImage(field, f"{reason} ({_mib(len(content))} were read). {_WAY_OUT}") from error


def bytes_of_text(text: str, *, field: Field, sources: ImageSources = NO_SOURCES) -> bytes:
    """The encoded picture behind a URL, a data URI, a stored input's path or base64 text.

    Raises:
        UnreadableImage: it cannot be had; the message says why.
    """
    if text[:4].lower() == "http":
        own = own_file(text, sources)
        return _read_file(own, field) if own else _fetched(text, field, sources)
    if text[:5].lower() == "data:":
        return _decode_base64(unquote(text.partition(",")[2]), "data URI", field)
    stored = _STORED_INPUT.fullmatch(text)
    if stored and sources.output_root is not None:
        try:
            return _read_file(stored_file(stored[1], sources.output_root), field)
        except NotFound as error:
            raise UnreadableImage(field, f"The picture {text!r} is not on this server any more.") from error
    return _decode_base64(text, "base64 text", field)


def own_file(url: str, sources: ImageSources) -> Path | None:
    """The file behind one of our own URLs (`{base}/outputs/…`, `{base}/inputs/…`), or None for other URLs."""
    if sources.output_root is None:
        return None
    for base in sources.own_bases:
        prefix = base.rstrip("/") + "/"
        if url.lower().startswith(prefix.lower()):
            path = urlsplit(f"http://own/{url[len(prefix) :]}").path
            return url_path_file(unquote(path), sources.output_root)
    return None


def url_path_file(path: str, output_root: Path) -> Path | None:
    """The picture below the output folder that a decoded URL path (`/outputs/{date}/{file}`) names, or None.

    None also for anything that leads out of the folder, through links or dots, and for other suffixes.
    """
    parts = path.strip("/").split("/")
    if len(parts) == 3 and parts[0] == "outputs":
        relative = parts[1:]
    elif len(parts) == 2 and parts[0] == INPUT_FOLDER:
        relative = parts
    else:
        return None
    try:
        return stored_file("/".join(relative), output_root)
    except NotFound:
        return None


def stored_file(relative: str, output_root: Path) -> Path:
    """The picture at a relative path (`{date}/{file}` or `inputs/{file}`) below the output folder.

    Raises:
        NotFound: no such picture, not a picture's suffix, hidden, or outside the folder.
    """
    parts = relative.split("/")
    safe = len(parts) == 2 and all(
        part and not part.startswith(".") and not any(mark in part for mark in "\\:\0") for part in parts
    )
    suffix = relative.rsplit(".", 1)[-1].lower()
    if safe and suffix in FILE_FORMATS:
        try:
            root = output_root.resolve()
            found = (root / relative).resolve()
            is_picture = found.suffix[1:].lower() in FILE_FORMATS  # a link may lead to another kind of file
            if is_picture and found.is_relative_to(root) and found.is_file():
                return found
        except OSError:  # such as a name too long for the file system
            pass
    raise NotFound(f"There is no picture {relative[:200]!r} in the output folder.")


def content_hash(image: Image.Image) -> str:
    """SHA-256 of mode, size and pixels in 64 hex digits: equal pictures, equal hashes, however encoded."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height}\n".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def store_input(image: Image.Image, output_root: Path) -> str:
    """Keeps an input picture as `inputs/{sha256}.png` and returns that path; equal pictures share the file.

    Raises:
        StorageFull: the file cannot be written.
    """
    relative = f"{INPUT_FOLDER}/{content_hash(image)}.png"
    target = output_root / relative
    if not target.is_file():
        buffer = io.BytesIO()
        image.save(buffer, "PNG", compress_level=1)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, buffer.getvalue())
        except OSError as error:
            raise StorageFull(f"The input picture could not be stored in {str(target)!r}: {error}.") from error
    return relative


def encode(image: Image.Image, output_format: str) -> bytes:
    """A picture as png, jpg, jpeg or webp bytes, with the quality of saved files and without metadata."""
    file_format = FILE_FORMATS[output_format]
    buffer = io.BytesIO()
    if file_format == "PNG":
        image.save(buffer, "PNG", compress_level=4)
    elif file_format == "JPEG":
        flatten(image).save(buffer, "JPEG", quality=95, optimize=True, progressive=True)
    else:
        image.save(buffer, "WEBP", quality=95)
    return buffer.getvalue()


def file_as(path: Path, output_format: str) -> bytes:
    """A saved picture in another format; if it has that format, the very bytes of the file with its metadata.

    Raises:
        NotFound: the file is gone.
        UnreadableImage: the file is not a readable picture.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise NotFound(f"The picture {path.name!r} cannot be read: {error}.") from error
    try:
        with Image.open(io.BytesIO(content), formats=READABLE_FORMATS) as image:
            if image.format == FILE_FORMATS[output_format]:
                return content
            return encode(image, output_format)
    except UNREADABLE as error:
        raise UnreadableImage("file", f"{path.name!r} is not a readable picture.") from error


def preview_jpeg(image: Image.Image, max_side_px: int = PREVIEW_SIDE_PX) -> bytes:
    """A small JPEG for the page: sides of at most `max_side_px` pixels."""
    small = flatten(_fitted(image, max_side_px))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def preview_png(image: Image.Image, max_side_px: int = PREVIEW_SIDE_PX) -> bytes:
    """A small PNG for the API's streams: sides of at most `max_side_px` pixels."""
    buffer = io.BytesIO()
    _fitted(image, max_side_px).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def flatten(image: Image.Image, background: int = 255) -> Image.Image:
    """The picture as `RGB`, or `L` if grey; alpha is composited on `background` (0 black, 255 white)."""
    if image.mode.startswith("I"):  # 16 bits per pixel: 65535 / 257 = 255
        image = image.convert("I").point(lambda level: level * (1 / 257) + 0.5).convert("L")
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        ground = Image.new("RGBA", layers.size, (background, background, background, 255))
        image = Image.alpha_composite(ground, layers).convert("RGB")
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def _plain(image: Image.Image, *, as_mask: bool) -> Image.Image:
    upright = ImageOps.exif_transpose(image)
    plain = flatten(upright, background=0 if as_mask else 255).convert("L" if as_mask else "RGB")
    plain = plain.copy() if plain is image else plain
    plain.info = {}
    return plain


def _fitted(image: Image.Image, max_side_px: int) -> Image.Image:
    if max(image.size) <= max_side_px:
        return image
    small = image.copy()
    small.thumbnail((max_side_px, max_side_px), Image.Resampling.BILINEAR)
    return small


def _check_size(size: tuple[int, int], field: Field) -> None:
    width, height = size
    if width * height > MAX_IMAGE_PIXELS:
        megapixels = width * height / 1e6
        raise UnreadableImage(
            field,
            f"The picture has {width}x{height} pixels, {megapixels:.0f} megapixels; at most 64 are allowed.",
        )


def _fetched(url: str, field: Field, sources: ImageSources) -> bytes:
    if sources.fetch is None:
        raise UnreadableImage(field, f"URLs are not fetched here ({url[:200]!r}). Send the picture itself.")
    try:
        return sources.fetch(url)
    except FetchRefused as error:
        message = f"The URL {url[:200]!r} could not be fetched: {error} Or send the picture itself, as base64."
        raise UnreadableImage(field, message) from error


def _decode_base64(text: str, what: str, field: Field) -> bytes:
    if len(text) > MAX_IMAGE_BYTES * 1.5:
        raise UnreadableImage(field, f"The {what} has {_mib(len(text))}; pictures of at most 50 MiB are accepted.")
    compact = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError):
        start = text[:24] + ("…" if len(text) > 24 else "")
        raise UnreadableImage(field, f"The {what} {start!r} is not base64. {_WAY_OUT}") from None


def _read_file(path: Path, field: Field) -> bytes:
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise UnreadableImage(field, f"{path.name!r} is larger than the 50 MiB that are accepted.")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableImage(field, f"The picture {path.name!r} is not on this server any more.") from error


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB" if size_bytes >= 2**19 else f"{size_bytes} bytes"
