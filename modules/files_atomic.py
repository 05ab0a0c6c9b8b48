"""Writes files so that nobody, not even after a kill, ever sees half of one."""

import importlib
import os
import random
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

PARTIAL_SUFFIX: Final = ".part"


def write_atomically(target: Path, content: bytes, *, durable: bool = True) -> None:
    """Replaces `target` by `content`; a reader, or a kill, finds the old or the new file and nothing between.

    durable: also wait for the disk, so that a power cut cannot undo it.

    Raises:
        OSError: as the file system reports it; the old file is then untouched.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}-{random.getrandbits(32):08x}{PARTIAL_SUFFIX}")
    try:
        with partial.open("xb") as stream:
            stream.write(content)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where the system can."""
    if os.name == "nt":  # Windows cannot open folders, and does not need to
        return
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


_LOCK_BYTE: Final = 2**31 - 2
"""Windows locks bytes, and a locked byte cannot be read by others: one where no file of ours has content they read."""


def lock_now(descriptor: int) -> None:
    """Lock an open file for this process, without waiting; the lock ends when the file is closed.

    Raises:
        OSError: somebody else holds the lock.
    """
    if os.name == "nt":
        msvcrt: Any = importlib.import_module("msvcrt")
        os.lseek(descriptor, _LOCK_BYTE, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        fcntl: Any = importlib.import_module("fcntl")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
