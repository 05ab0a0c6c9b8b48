"""Compares the history with the output folder and reports where they disagree."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from modules.choices import OutputFormat, TaskStatus
from modules.history import History

_DAY: Final = re.compile(r"^\d{4}-\d\d-\d\d$")
_SUFFIXES: Final = tuple(f".{suffix.value}" for suffix in OutputFormat)


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found.

    damaged: unreadable stretches of the log, in words. torn_bytes: length of an unfinished last transaction.
    missing: (task id, path) of results whose file is gone. orphans: pictures that no record names.
    twice: task ids that more than one record has.
    """

    records: int
    pictures: int
    damaged: tuple[str, ...]
    torn_bytes: int
    missing: tuple[tuple[str, str], ...]
    orphans: tuple[str, ...]
    twice: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        """Whether log, records and files agree; an unfinished transaction is no fault."""
        return not (self.damaged or self.missing or self.orphans or self.twice)


def check(folder: Path) -> Report:
    """Look through the output folder `folder` without changing anything; a server may be running beside.

    Raises:
        HistoryDamaged: the log cannot be read at all.
        OSError: there is none.
    """
    files = {path.relative_to(folder).as_posix(): path for path in pictures(folder)}
    with History(folder, read_only=True) as history:
        storage = history.storage
        results: dict[str, str] = {}
        tasks: set[str] = set()
        twice: list[str] = []
        working_since: list[int] = []
        count = 0
        for record in history.each():
            count += 1
            if record.task_id in tasks:
                twice.append(record.task_id)
            tasks.add(record.task_id)
            results.update(dict.fromkeys(record.result, record.task_id))
            if record.task_status is TaskStatus.RUNNING:
                working_since.append(record.start_mills)
    fresh = min(working_since, default=None)  # a running task's newest picture may not be in its record yet
    return Report(
        records=count,
        pictures=len(files),
        damaged=tuple(map(str, storage.damaged)),
        torn_bytes=storage.torn_bytes,
        missing=tuple(
            (task, path) for path, task in results.items() if path not in files and not (folder / path).is_file()
        ),
        orphans=tuple(name for name, path in sorted(files.items()) if name not in results and _is_older(path, fresh)),
        twice=tuple(twice),
    )


def pictures(folder: Path) -> Iterator[Path]:
    """The pictures in the day folders of an output folder."""
    for day in sorted(folder.iterdir() if folder.is_dir() else ()):
        if day.is_dir() and _DAY.match(day.name):
            yield from (path for path in sorted(day.iterdir()) if path.suffix.lower() in _SUFFIXES)


def _is_older(path: Path, mills: int | None) -> bool:
    return mills is None or not path.exists() or 1000 * path.stat().st_mtime < mills
