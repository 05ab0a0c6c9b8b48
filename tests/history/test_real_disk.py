"""The history on a small disk that really fills up and is really remounted read-only; needs the right to mount."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.choices import TaskStatus
from modules.errors import StorageFull
from modules.history import FILE_NAME, History
from modules.record import Record


def mount(*words: str | Path) -> bool:
    command = ["mount", *map(str, words)]
    return subprocess.run(command, capture_output=True, timeout=20, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        sys.platform != "linux"
        or not shutil.which("mount")
        or not mount("-t", "tmpfs", "-o", "size=256k", "tmpfs", folder)
    ):
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", "-l", folder], timeout=20, check=True)


def record(number: int) -> Record:
    return Record(task_id=f"{number:032x}", in_queue_mills=number, req_params={"prompt": "p" * 3000, "n": number})


def add_until_full(history: History) -> list[Record]:
    """What was acknowledged before the disk was full."""
    acknowledged: list[Record] = []
    for number in range(1000):
        try:
            acknowledged.append(history.add(record(number)))
        except StorageFull:
            with pytest.raises(StorageFull, match="No space left"):
                history.add(record(2000))
            return acknowledged
    raise AssertionError("the disk never filled up")


def test_a_disk_that_fills_up_loses_nothing_acknowledged_and_serves_again_when_freed(small_disk: Path) -> None:
    picture = small_disk / "picture.png"
    picture.write_bytes(bytes(100_000))
    with History(small_disk) as history:
        acknowledged = add_until_full(history)
        assert len(acknowledged) > 10
        for known in acknowledged:
            assert history.get(known.task_id) == known
        with pytest.raises(StorageFull):
            history.storage.compact()
        assert not small_disk.joinpath(FILE_NAME + ".tmp").exists()
        picture.unlink()
        acknowledged.append(history.add(record(5000)))
    with History(small_disk) as history:
        assert history.page(page_size=None, statuses=TaskStatus) == acknowledged[::-1]
        assert not history.storage.damaged
        assert not history.storage.torn_bytes


def test_a_full_disk_can_be_opened_and_read(small_disk: Path) -> None:
    with History(small_disk) as history:
        acknowledged = add_until_full(history)
    with History(small_disk) as history:
        assert history.page(page_size=None, statuses=TaskStatus) == acknowledged[::-1]


def test_a_disk_that_becomes_read_only_is_told_and_stays_readable(small_disk: Path) -> None:
    with History(small_disk) as history:
        kept = history.add(record(1))
    assert mount("-o", "remount,ro", small_disk)
    with pytest.raises(StorageFull, match="Read-only file system"):
        History(small_disk)
    with History(small_disk, read_only=True) as history:
        assert history.get(kept.task_id) == kept
    assert mount("-o", "remount,rw", small_disk)
    with History(small_disk) as history:
        assert history.get(kept.task_id) == kept
