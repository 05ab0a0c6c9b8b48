"""Keeps the unfinished part of a download on the disk: locked, and never longer than what is surely there.

A file is called `NAME.part` until it is whole; `NAME.part.json` beside it says which version of it the bytes are of.
"""

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final

from modules.files_atomic import lock_now, sync_folder, write_atomically

logger = logging.getLogger(__name__)

SYNC_BYTES: Final = 64 << 20  # what a power cut may cost
_BUSY: Final = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK})


@dataclass(frozen=True, slots=True)
class Version:
    """Which version of a file the bytes of a part belong to.

    url: where it comes from. etag, last_modified: as the server wrote them. total: bytes of the whole file, if known.
    sha256: of the whole file, "" if not known. synced: bytes that are surely on the disk.
    """

    url: str
    etag: str = ""
    last_modified: str = ""
    total: int | None = None
    sha256: str = ""
    synced: int = 0

    @property
    def validator(self) -> str:
        """What `If-Range` takes: a strong ETag, else the date; "" if the version cannot be told."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified


class Part:
    """The unfinished file: opened, locked, with the place where writing goes on."""

    def __init__(self, path: Path, stream: BinaryIO, known: Version) -> None:
        self._path = path
        self._stream = stream
        self.known = known
        self.size = 0

    @property
    def name(self) -> str:
        """The file's name when it is finished."""
        return self._path.name.removesuffix(".part")

    @property
    def folder(self) -> Path:
        """Where it is."""
        return self._path.parent

    @classmethod
    def opened(cls, target: Path, url: str) -> "Part | None":
        """The part of a file, locked, cut to what can be relied on; None if somebody else holds it."""
        path = part_path(target)
        stream = open(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644), "r+b")  # noqa: SIM115
        if not _is_ours(path, stream):
            stream.close()
            return None
        part = cls(path, stream, Version(url))
        found = _read_notes(_notes_path(path))
        if found is not None and found.url == url and found.validator:
            part.size = min(found.synced, size_on_disk(path))
            part.known = replace(found, synced=part.size)
        part._cut()
        return part

    def begin(self, known: Version) -> None:
        """Start again with another version of the file."""
        self.size = 0
        self.known = replace(known, synced=0)
        self._cut()
        self._note()

    def write(self, chunk: bytes) -> None:
        """Append bytes; now and then they are brought safely to the disk."""
        self._stream.write(chunk)
        self.size += len(chunk)
        if self.size - self.known.synced >= SYNC_BYTES:
            self.sync()

    def sync(self) -> None:
        """Bring everything to the disk, and note how much that is."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self.known = replace(self.known, synced=self.size)
        self._note()

    def blocks(self) -> Iterator[bytes]:
        """The content from the beginning."""
        self._stream.flush()
        self._stream.seek(0)
        while block := self._stream.read(1 << 20):
            yield block

    def head(self, count: int) -> bytes:
        """The first bytes."""
        self._stream.flush()
        self._stream.seek(0)
        return self._stream.read(count)

    def finish(self, target: Path) -> None:
        """Give the file its name."""
        self.sync()
        if os.name == "nt":  # an open file cannot be renamed there
            self._stream.close()
        os.replace(self._path, target)
        _notes_path(self._path).unlink(missing_ok=True)
        sync_folder(target.parent)

    def discard(self) -> None:
        """Forget everything that came."""
        self.begin(Version(self.known.url))

    def close(self) -> None:
        """Keep what came, and let others at it."""
        if self._stream.closed:
            return
        with suppress(OSError):  # a full disk; what is noted stays true
            if self.size > self.known.synced and self.known.validator:
                self.sync()
        if not self.known.synced:  # nothing that a later download could go on with
            with suppress(OSError):
                _notes_path(self._path).unlink(missing_ok=True)
                self._path.unlink(missing_ok=True)
        with suppress(OSError):
            self._stream.close()

    def _cut(self) -> None:
        self._stream.flush()
        self._stream.truncate(self.size)
        self._stream.seek(self.size)

    def _note(self) -> None:
        write_atomically(_notes_path(self._path), json.dumps(asdict(self.known)).encode(), durable=False)


def _is_ours(path: Path, stream: BinaryIO) -> bool:
    """Lock the part; False if somebody else holds it, or has just finished it."""
    try:
        lock_now(stream.fileno())
    except OSError as error:
        if error.errno in _BUSY:
            return False
        logger.warning("%s cannot be locked (%s); the download goes on without.", path.name, error.strerror)
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def part_path(target: Path) -> Path:
    """Where a file is until it is whole."""
    return target.with_name(f"{target.name}.part")


def _notes_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_notes(path: Path) -> Version | None:
    """What was noted about a part, None if that cannot be read."""
    try:
        known = Version(**json.loads(path.read_text(encoding="utf-8")))
        return known if isinstance(known.synced, int) and isinstance(known.validator, str) else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def size_on_disk(path: Path) -> int:
    """Bytes of a file, 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
