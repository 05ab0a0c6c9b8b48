"""Where generation parameters sit in a picture file: PNG text chunks, EXIF in JPEG and WebP."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypedDict

from PIL import Image, PngImagePlugin

from modules.choices import MetadataScheme
from modules.images import FileFormat
from modules.metadata import RunFacts, parameters_text, request_json

logger = logging.getLogger(__name__)

TEXT_CHUNK: Final = "parameters"
SCHEME_CHUNK: Final = "fooocus_scheme"
REQUEST_CHUNK: Final = "focale_request"
EXIF_IFD: Final = 0x8769
TAG_USER_COMMENT: Final = 0x9286
TAG_MAKER_NOTE: Final = 0x927C
TAG_SOFTWARE: Final = 0x0131
UNICODE_PREFIX: Final = b"UNICODE\0"
SEGMENT_NAME: Final = b"focale_request\0"  # begins each APP10 segment of a JPEG that holds a long request
SEGMENT_BYTES: Final = 65_000
MAX_JPEG_EXIF_BYTES: Final = 65533  # one APP1 segment; WebP and PNG have no such limit


@dataclass(frozen=True, slots=True)
class Embedding:
    """What to write into a file: the facts of the picture, and the scheme of the text."""

    facts: RunFacts
    scheme: MetadataScheme


class SaveArguments(TypedDict, total=False):
    """Keyword arguments for `Image.save` that carry metadata."""

    pnginfo: PngImagePlugin.PngInfo
    exif: bytes
    extra: bytes


@dataclass(frozen=True, slots=True)
class StoredText:
    """What was found in a file.

    text: the parameters, or None.  scheme: the scheme the file names, or None.  request: the complete request
    as JSON text when it is stored beside the text.  chunks: all PNG text chunks, for other programs' formats.
    """

    text: str | None
    scheme: str | None
    request: str | None
    chunks: dict[str, str]


def save_arguments(embedding: Embedding, file_format: FileFormat) -> SaveArguments:
    """Arguments that make `Image.save` write the metadata.

    PNG: text chunks `parameters`, `fooocus_scheme`, `focale_request`. JPEG and WebP: EXIF UserComment (with
    the UNICODE prefix), MakerNote and Software, in the Exif directory where the standard wants them and, if
    there is room, in the main one where Fooocus looks. A request too long for JPEG's 64 KiB of EXIF goes into
    segments of its own.
    """
    if file_format == "PNG":
        return {"pnginfo": _png_chunks(embedding)}
    exif, holds_request = next(
        (block, complete)
        for block, complete in _exif_candidates(embedding)
        if file_format != "JPEG" or len(block) <= MAX_JPEG_EXIF_BYTES
    )
    return {"exif": exif} if holds_request else {"exif": exif, "extra": _request_segments(embedding)}


def stored_text(image: Image.Image) -> StoredText:
    """Reads what programs stored in an open picture; never raises for odd content."""
    chunks = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    if TEXT_CHUNK in chunks:
        return StoredText(chunks[TEXT_CHUNK], chunks.get(SCHEME_CHUNK), chunks.get(REQUEST_CHUNK), chunks)
    text, scheme = _exif_text(image)
    if text is None:
        comment = image.info.get("comment")  # A1111 also writes a GIF-like comment; some tools keep only that
        text = comment.decode("utf-8", "replace") if isinstance(comment, bytes) else None
    request = chunks.get(REQUEST_CHUNK) or _segmented_request(image)
    return StoredText(text, scheme or chunks.get(SCHEME_CHUNK), request, chunks)


def decode_user_comment(value: object) -> str | None:
    """An EXIF UserComment as text: UNICODE, ASCII or JIS prefix, or bare UTF-8, or already text."""
    if isinstance(value, str):
        return _fixed_latin(value).rstrip("\0")
    if isinstance(value, tuple):  # Pillow gives BYTE arrays of some files as tuples of numbers
        value = bytes(number & 0xFF for number in value if isinstance(number, int))
    if not isinstance(value, bytes):
        return None
    head, body = value[:8], value[8:]
    if head == UNICODE_PREFIX:
        return _decode_utf16(body)
    if head in (b"ASCII\0\0\0", b"\0" * 8):
        return body.rstrip(b"\0").decode("utf-8", "replace")
    if head == b"JIS\0\0\0\0\0":
        return body.rstrip(b"\0").decode("iso2022_jp", "replace")
    return value.rstrip(b"\0").decode("utf-8", "replace")


def _png_chunks(embedding: Embedding) -> PngImagePlugin.PngInfo:
    chunks = PngImagePlugin.PngInfo()
    text = parameters_text(embedding.facts, embedding.scheme, with_request=False)
    _add_chunk(chunks, TEXT_CHUNK, text)
    _add_chunk(chunks, SCHEME_CHUNK, str(embedding.scheme))
    if embedding.facts.request is not None:
        _add_chunk(chunks, REQUEST_CHUNK, request_json(embedding.facts.request))
    return chunks


def _add_chunk(chunks: PngImagePlugin.PngInfo, name: str, text: str) -> None:
    text = _encodable(text).replace("\0", "�")  # NUL ends a field of a PNG chunk
    if text.isascii():
        chunks.add_text(name, text)
    else:
        chunks.add_itxt(name, text)


def _exif_candidates(embedding: Embedding) -> Iterable[tuple[bytes, bool]]:
    """EXIF blocks from the most complete to the smallest, each with whether it holds the request."""
    plain, full = (
        _encodable(parameters_text(embedding.facts, embedding.scheme, with_request=with_request))
        for with_request in (False, True)
    )
    yield _exif_block(embedding, comment=_unicode_comment(full), legacy=plain), True
    yield _exif_block(embedding, comment=_unicode_comment(full), legacy=None), True
    yield _exif_block(embedding, comment=_unicode_comment(plain), legacy=None), False
    yield _exif_block(embedding, comment=plain.encode(), legacy=None), False
    yield _exif_block(embedding, comment=b"", legacy=None), False


def _request_segments(embedding: Embedding) -> bytes:
    """The request in as many application segments of a JPEG file as it takes; other readers skip them."""
    if embedding.facts.request is None:
        return b""
    content = request_json(embedding.facts.request).encode("ascii")
    pieces = (content[start : start + SEGMENT_BYTES] for start in range(0, len(content), SEGMENT_BYTES))
    bodies = (SEGMENT_NAME + piece for piece in pieces)
    return b"".join(b"\xff\xea" + (len(body) + 2).to_bytes(2, "big") + body for body in bodies)


def _segmented_request(image: Image.Image) -> str | None:
    segments = (content for name, content in getattr(image, "applist", ()) if name == "APP10")
    pieces = [content.removeprefix(SEGMENT_NAME) for content in segments if content.startswith(SEGMENT_NAME)]
    return b"".join(pieces).decode("ascii", "replace") or None


def _unicode_comment(text: str) -> bytes:
    return UNICODE_PREFIX + text.encode("utf-16-be")


def _exif_block(embedding: Embedding, *, comment: bytes, legacy: str | None) -> bytes:
    exif = Image.Exif()
    scheme = str(embedding.scheme).encode("ascii")
    exif[TAG_SOFTWARE] = embedding.facts.version.encode("ascii", "replace").decode("ascii")
    exif[TAG_MAKER_NOTE] = scheme
    if legacy is not None:
        exif[TAG_USER_COMMENT] = legacy if legacy.isascii() else legacy.encode()  # text, as Fooocus expects it
    directory = exif.get_ifd(EXIF_IFD)
    directory[TAG_USER_COMMENT] = comment
    directory[TAG_MAKER_NOTE] = scheme
    return exif.tobytes()


def _exif_text(image: Image.Image) -> tuple[str | None, str | None]:
    try:
        exif = image.getexif()
        directories = (exif.get_ifd(EXIF_IFD), exif)
        texts = [decode_user_comment(directory.get(TAG_USER_COMMENT)) for directory in directories]
        schemes = [decode_user_comment(directory.get(TAG_MAKER_NOTE)) for directory in directories]
    except (SyntaxError, ValueError, KeyError, TypeError, OSError, OverflowError, ArithmeticError):
        logger.debug("Unreadable EXIF block", exc_info=True)
        return None, None
    return next(filter(None, texts), None), next(filter(None, schemes), None)


def _decode_utf16(body: bytes) -> str:
    if body[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return body.decode("utf-16", "replace")
    # The prefix does not tell the byte order. Parameter texts hold ASCII labels, whose high byte is 0.
    high_first, low_first = body[0::2].count(0), body[1::2].count(0)
    order = "utf-16-le" if low_first > high_first else "utf-16-be"
    return body.decode(order, "replace").rstrip("\0")


def _fixed_latin(text: str) -> str:
    """UTF-8 that a reader took for Latin-1 becomes the text it was; anything else stays."""
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return text


def _encodable(text: str) -> str:
    """The text without lone surrogates, which no encoding can hold."""
    return text.encode("utf-8", "replace").decode("utf-8")
