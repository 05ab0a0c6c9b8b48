"""Gives the history log its files, locks and flushes, alike on POSIX and on Windows."""

import errno
import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO, Final

from modules.errors import HistoryLocked, StorageFull

logger = logging.getLogger(__name__)

_WINDOWS: Final = sys.platform == "win32"
_BINARY: Final[int] = getattr(os, "O_BINARY", 0)
_BUSY: Final = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK})


class LogFile:
    """One open log: whole appends at its end, reads at any place.

    size: bytes that count; what lies behind it was never acknowledged.
    """

    def __init__(self, path: Path, *, writable: bool) -> None:
        """Open `path`, which must exist. Raises OSError."""
        self.path = path
        self._reader = self._writer = -1
        self._open(writable=writable)
        self.size = os.fstat(self._reader).st_size

    def _open(self, *, writable: bool) -> None:
        self._reader = os.open(self.path, os.O_RDONLY | _BINARY)
        try:
            self._writer = os.open(self.path, os.O_WRONLY | os.O_APPEND | _BINARY) if writable else -1
        except OSError:
            self.close()
            raise

    def append(self, data: bytes) -> None:
        """Put `data` behind the last byte with one write; the caller truncates after an OSError.

        A regular file takes a write whole unless the disk fills up or a limit is met; then the call is
        repeated for the rest, which raises the reason.
        """
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._writer, rest) :]

    def truncate(self, size: int) -> None:
        """Cut the file to `size` bytes. Raises OSError."""
        os.ftruncate(self._writer, size)
        self.size = size

    def flush(self) -> None:
        """Return when everything written has reached the disk. Raises OSError."""
        flush_descriptor(self._writer)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`, fewer at the end. The caller serialises calls (Windows must seek)."""
        if hasattr(os, "pread"):
            return os.pread(self._reader, length, offset)
        os.lseek(self._reader, offset, os.SEEK_SET)
        return os.read(self._reader, length)

    def stream(self, buffer_bytes: int) -> BinaryIO:
        """The file from its beginning, to be read through and closed; never another one that took its name."""
        os.lseek(self._reader, 0, os.SEEK_SET)
        return os.fdopen(os.dup(self._reader), "rb", buffering=buffer_bytes)

    def take_name_of(self, other: "LogFile") -> "LogFile":
        """Replace `other` in the folder and give the file to use from now on; `other` is closed.

        Raises:
            OSError: the names stay as they were, and `other` stays in use.
        """
        if not _WINDOWS:
            os.replace(self.path, other.path)
            self.path = other.path
            other.close()
            return self
        self.close()  # Windows renames no open file
        other.close()
        try:
            os.replace(self.path, other.path)
        except OSError:  # a virus scanner may hold it for a moment; the next compaction tries again
            other._open(writable=True)
            raise
        return LogFile(other.path, writable=True)

    def close(self) -> None:
        """Release both descriptors; closing twice is fine."""
        for descriptor in (self._reader, self._writer):
            if descriptor >= 0:
                os.close(descriptor)
        self._reader = self._writer = -1


def flush_descriptor(descriptor: int) -> None:
    """Wait until the file's data and size are on the disk; its timestamps may follow later."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        os.fsync(descriptor)


def flush_folder(folder: Path) -> None:
    """Make names created or replaced in `folder` survive a power cut; Windows does that by itself."""
    if _WINDOWS:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_durably(path: Path, data: bytes) -> None:
    """Append `data` to the file at `path`, made if missing, and wait for the disk. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _BINARY, 0o644)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class WriterLock:
    """The right to write one log, held until `release` or the end of the process, however it ends."""

    def __init__(self, path: Path) -> None:
        """Take the lock file at `path`.

        Raises:
            HistoryLocked: another process, or another history of this one, holds it.
            StorageFull: the lock file cannot be written.
        """
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _BINARY, 0o644)
        except OSError as error:
            raise StorageFull(
                f"The history cannot be written in {path.parent} ({error.strerror}). "
                "Make the folder writable or choose another output folder."
            ) from error
        try:
            _lock(self._descriptor)
        except OSError as error:
            if error.errno in _BUSY:
                owner = _owner(self._descriptor)
                os.close(self._descriptor)
                raise HistoryLocked(
                    f"Another server{owner} already writes the history in {path.parent}. "
                    "Stop it first, or give this one an output folder of its own."
                ) from error
            logger.warning("%s cannot be locked (%s); start only one server on this folder.", path, error)
        self._sign()

    def _sign(self) -> None:
        """Name this process in the lock file, for the message a second server shows."""
        try:
            os.ftruncate(self._descriptor, 0)
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.write(self._descriptor, b"%d\n" % os.getpid())
        except OSError as error:  # a full disk; the lock itself needs no space
            logger.debug("The lock file stays unsigned: %s", error)

    def release(self) -> None:
        """Give the lock back; releasing twice is fine. The file stays, for removing it would race."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


_LOCK_BYTE: Final = 1 << 20
"""Windows locks bytes, and a locked byte cannot be read: one far behind the signature."""


def _lock(descriptor: int) -> None:
    """Lock without waiting. Raises OSError when somebody else holds the lock."""
    if _WINDOWS:
        msvcrt: Any = importlib.import_module("msvcrt")
        os.lseek(descriptor, _LOCK_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        fcntl: Any = importlib.import_module("fcntl")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _owner(descriptor: int) -> str:
    """ " (process 4711)" as the lock file says, or nothing."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    text = os.read(descriptor, 20).decode("ascii", "replace").strip()
    return f" (process {text})" if text.isdigit() else ""
