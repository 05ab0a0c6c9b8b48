"""Reads a history log from its beginning, past whatever is damaged."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from modules.history_frames import FrameDamaged, decode, prove
from modules.history_rows import Rows

_BEGINNING: Final = re.compile(rb'[0-9a-f]{8} \{"v":')
"""How frames begin, and nothing within one: JSON writes no space outside of a text and no bare quote in it."""


@dataclass(frozen=True, slots=True)
class Damage:
    """A stretch of the log that proves nothing: where, how long, and why. It is kept, never overwritten."""

    offset: int
    length: int
    reason: str

    def __str__(self) -> str:
        return f"{self.length} bytes at {self.offset} are damaged: {self.reason}"


@dataclass(frozen=True, slots=True)
class Proven:
    """A frame that proved itself: where it begins, and its line."""

    offset: int
    line: bytes


@dataclass(frozen=True, slots=True)
class Replay:
    """What reading a log found: where its last frame or damage ends, good frames, and all damage.

    Behind `end` there is nothing, or an unfinished frame that was never acknowledged.
    """

    end: int
    frames: int
    damaged: tuple[Damage, ...]


def replay(lines: Iterable[bytes], rows: Rows) -> Replay:
    """Apply every good frame of `lines` to `rows`."""
    end = frames = 0
    damaged = []
    for piece in scan(lines):
        if isinstance(piece, Damage):
            damaged.append(piece)
            end = max(end, piece.offset + piece.length)
        else:
            rows.apply(*decode(piece.line), piece.offset)
            frames += 1
            end = max(end, piece.offset + len(piece.line))
    return Replay(end, frames, tuple(damaged))


def scan(lines: Iterable[bytes]) -> Iterator[Proven | Damage]:
    """The frames and the damage of a log in order, without an unfinished last frame.

    A frame whose line feed is damaged is good, and so is the next one in the same line.
    """
    offset = 0
    for line in lines:
        if _reason(line):
            yield from _sift(line, offset)
        else:
            yield Proven(offset, line)
        offset += len(line)


def _sift(line: bytes, offset: int) -> Iterator[Proven | Damage]:
    """The pieces of a line, at `offset`, that is no single good frame."""
    starts = sorted({0, *(match.start() for match in _BEGINNING.finditer(line))})
    for start, stop in zip(starts, [*starts[1:], len(line)], strict=True):
        piece = line[start:stop]
        mended = piece[:-1] + b"\n"
        if not _reason(mended):
            yield Proven(offset + start, mended)
            if mended != piece:
                yield Damage(offset + stop - 1, 1, "it should be a line feed")
        elif piece.endswith(b"\n") or stop < len(line):
            yield Damage(offset + start, len(piece), _reason(piece))


def _reason(line: bytes) -> str:
    """Why the line is no frame, or "" if it is one."""
    try:
        prove(line)
    except FrameDamaged as error:
        return str(error)
    return ""
