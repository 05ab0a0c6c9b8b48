"""Reads wildcard files, and reads them again when they change."""

import logging
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Cached:
    """Lines of a file, and what the file looked like when they were read (mtime in ns, bytes)."""

    stamp: tuple[int, int]
    lines: tuple[str, ...]


@dataclass
class Wildcards:
    """The wildcards of some folders: `words` gives the lines of one by its file's stem.

    folders: searched in this order, sub-folders too; the first file with the stem wins, files nearer to the
        top first. A folder need not exist.

    New, changed and deleted files count at once; unchanged ones are not read again.
    """

    folders: tuple[Path, ...]
    _files: dict[str, Path] = field(default_factory=dict, init=False, repr=False)
    _listed: dict[Path, int] | None = field(default=None, init=False, repr=False)
    _cache: dict[Path, _Cached] = field(default_factory=dict, init=False, repr=False)

    def names(self) -> list[str]:
        """Every wildcard there is, by name."""
        self._list_again_if_changed()
        return sorted(self._files)

    def words(self, name: str) -> tuple[str, ...]:
        """The non-empty lines of the wildcard, trimmed; none if there is no such file or it is unreadable."""
        self._list_again_if_changed()
        path = self._files.get(name)
        if path is None:
            return ()
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_size)
            cached = self._cache.get(path)
            if cached is None or cached.stamp != stamp:
                cached = _Cached(stamp, _lines(path.read_bytes()))
                self._cache[path] = cached
        except OSError as error:
            logger.warning("Wildcard file %s cannot be read: %s", path.name, error)
            return ()
        return cached.lines

    def refresh(self) -> None:
        """Forgets everything; the next question reads the folders again."""
        self._listed = None
        self._cache.clear()

    def _list_again_if_changed(self) -> None:
        """Lists the folders when one of them, or a sub-folder, has got or lost an entry since last time."""
        if self._listed is not None and all(_changed_at(folder) == at for folder, at in self._listed.items()):
            return
        self._listed = {}
        self._files = {}
        for top in self.folders:
            self._listed[top] = _changed_at(top)
            entries = sorted(top.rglob("*"), key=lambda path: (len(path.parts), path)) if top.is_dir() else []
            for path in entries:
                if path.is_dir():
                    self._listed[path] = _changed_at(path)
                elif path.suffix.lower() == ".txt":
                    self._files.setdefault(path.stem, path)


def _changed_at(folder: Path) -> int:
    """When the folder's entries changed last, in ns since 1970; −1 if it does not exist."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1


def _lines(data: bytes) -> tuple[str, ...]:
    """Non-empty lines of a text file in UTF-8, with or without a byte order mark, else in Latin-1."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return tuple(line for line in map(str.strip, text.splitlines()) if line)
