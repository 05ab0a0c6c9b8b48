r"""Writes one history transaction as one line of bytes that proves itself, and reads it back.

    crc32 SP header (TAB hot TAB cold)* LF

The header, and the hot and cold half of each stored document, are JSON, which never holds a raw tab or line
feed. Hence a line feed always ends a frame, and a damaged frame hides none of those behind it.
"""

import zlib
from typing import Any, Final, NamedTuple

import orjson

from modules.errors import HistoryDamaged

VERSION: Final = 1
_PREFIX: Final = 9  # eight hexadecimal digits and a space
_STRICT: Final = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME


class FrameDamaged(ValueError):
    """A line of the log is not a frame: cut short or altered."""


class Stored(NamedTuple):
    """One document as a frame holds it: its id and its two JSON halves; cold is b"" when there is none."""

    doc_id: int
    hot: bytes
    cold: bytes


class Frame(NamedTuple):
    """One transaction on one table, applied in the order of its fields.

    dropped: the table goes, or all tables if it is "". cleared: all its documents go.
    removed: these ids go. stored: these documents come.
    highest: the largest id the table ever gave away, so that removing the newest document frees no id.
    """

    table: str
    dropped: bool = False
    cleared: bool = False
    removed: tuple[int, ...] = ()
    stored: tuple[Stored, ...] = ()
    highest: int = 0


class Placed(NamedTuple):
    """A stored document with the place of its cold half, counted from the start of its line."""

    doc_id: int
    hot: bytes
    offset: int
    length: int


def to_json(value: object) -> bytes:
    """`value` as JSON bytes. Raises TypeError for what JSON cannot say, and for integers beyond 64 bits."""
    return orjson.dumps(value, option=_STRICT)


def from_json(data: bytes) -> Any:  # noqa: ANN401
    """The value of JSON bytes this module wrote."""
    return orjson.loads(data)


def encode(frame: Frame) -> bytes:
    """The line of `frame`, with its line feed."""
    header: dict[str, object] = {"v": VERSION, "t": frame.table}
    if frame.dropped:
        header["x"] = 1
    if frame.cleared:
        header["c"] = 1
    if frame.removed:
        header["d"] = frame.removed
    if frame.stored:
        header["s"] = [stored.doc_id for stored in frame.stored]
    if frame.highest:
        header["h"] = frame.highest
    parts = [to_json(header)]
    for stored in frame.stored:
        parts += (stored.hot, stored.cold)
    body = b"\t".join(parts)
    return b"%08x %b\n" % (zlib.crc32(body), body)


def prove(line: bytes) -> bytes:
    """What `line` says, without checksum and line feed. Raises FrameDamaged if it does not prove itself."""
    if not line.endswith(b"\n"):
        raise FrameDamaged("it is cut short")
    body = line[_PREFIX:-1]
    if line[:_PREFIX] != b"%08x " % zlib.crc32(body):
        raise FrameDamaged("its checksum is wrong")
    return body


def decode(line: bytes) -> tuple[Frame, list[Placed]]:
    """The frame of `line` without its stored documents, and these with their places.

    Raises:
        FrameDamaged: the line does not prove itself.
        HistoryDamaged: a newer version of Focale wrote it.
    """
    parts = prove(line).split(b"\t")
    header = from_json(parts[0])
    if header["v"] > VERSION:
        raise HistoryDamaged(
            f"This history is of format {header['v']}, and {VERSION} is the newest known here. "
            "Update Focale, or choose another output folder."
        )
    frame = Frame(
        table=header["t"],
        dropped=bool(header.get("x")),
        cleared=bool(header.get("c")),
        removed=tuple(header.get("d", ())),
        highest=header.get("h", 0),
    )
    return frame, _place(header.get("s", ()), parts)


def _place(doc_ids: list[int], parts: list[bytes]) -> list[Placed]:
    """Each document with its hot half and the place of its cold one."""
    placed = []
    offset = _PREFIX + len(parts[0]) + 1
    for position, doc_id in enumerate(doc_ids):
        hot, cold = parts[2 * position + 1], parts[2 * position + 2]
        offset += len(hot) + 1
        placed.append(Placed(doc_id, hot, offset, len(cold)))
        offset += len(cold) + 1
    return placed
