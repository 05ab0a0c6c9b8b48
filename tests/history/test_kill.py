"""Kills writers for real: at random moments, and before, in and after each system call of a compaction."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from modules import history_files
from modules.choices import TaskStatus
from modules.history import FILE_NAME, History
from modules.history_tables import LogDB
from tests.history.killed_writer import steps_from

ROUNDS = int(os.environ.get("FOCALE_KILL_ROUNDS", "5"))
pytestmark = pytest.mark.crash


def acknowledged_before_kill(folder: Path, start: int, after_s: float) -> int:
    """Run a writer, kill it, and give how many steps had returned."""
    command = [sys.executable, "-m", "tests.history.killed_writer", str(folder), str(start)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.read(1) == b"r"
        time.sleep(after_s)
        writer.send_signal(signal.SIGKILL)
        return len(writer.stdout.read())


def after(steps: int, start: int, before: dict[int, str]) -> dict[int, str]:
    """The tasks and their states when `steps` steps have been taken."""
    states = {**before, **{number: status for status, number in itertools.islice(steps_from(start), steps)}}
    return {number: status for number, status in states.items() if status != "deleted"}


def test_nothing_acknowledged_is_lost_to_sigkill(tmp_path: Path) -> None:
    chance = random.Random()
    states: dict[int, str] = {}
    acknowledged = compactions = torn = 0
    History(tmp_path).close()
    log = tmp_path / FILE_NAME
    for start in range(10_000, 10_000 * (ROUNDS + 1), 10_000):
        inode = log.stat().st_ino
        steps = acknowledged_before_kill(tmp_path, start, chance.uniform(0.05, 0.5))
        compactions += log.stat().st_ino != inode
        with History(tmp_path) as history:
            assert not history.storage.damaged
            torn += history.storage.torn_bytes > 0
            records = history.page(page_size=None, statuses=TaskStatus)
        assert len({record.id for record in records}) == len({record.task_id for record in records}) == len(records)
        seen = {int(record.task_id, 16): str(record.task_status) for record in records}
        assert seen in (after(steps, start, states), after(steps + 1, start, states))
        for record in records:
            number = int(record.task_id, 16)
            assert record.req_params == {"prompt": "p" * 2000, "n": number}
            assert record.result == ((f"{number}.png",) if record.task_status.is_final else ())
        states = seen
        acknowledged += steps
    print(f"{ROUNDS} rounds, {acknowledged} acknowledged steps, 0 lost; {compactions} compactions, {torn} torn tails")
    assert acknowledged > ROUNDS


class DyingOs:
    """Stands in for `os` in the files module and ends the process at the n-th call that alters the disk."""

    ALTERING = ("write", "fdatasync", "fsync", "ftruncate", "replace", "open")

    def __init__(self, calls_left: int, *, late: bool) -> None:
        self.calls_left = calls_left
        self.late = late

    def __getattr__(self, name: str) -> object:
        real: Callable[..., object] = getattr(os, name)
        if name not in self.ALTERING:
            return real

        def call(*args: object) -> object:
            self.calls_left -= 1
            if self.calls_left < 0 and name == "write":
                real(args[0], bytes(args[1])[: len(bytes(args[1])) // 2])  # type: ignore[arg-type]
            if self.calls_left < 0 and not self.late:
                os._exit(9)
            result = real(*args)
            if self.calls_left < 0:
                os._exit(9)
            return result

        return call


def compact_and_die(path: Path, calls: int, *, late: bool) -> bool:
    """Compact in a child that dies at its n-th altering call; whether it died before the end."""
    child = os.fork()
    if child == 0:
        try:
            db = LogDB(path)
            history_files.os = DyingOs(calls, late=late)  # type: ignore[attr-defined]
            db.storage.compact()  # type: ignore[attr-defined]
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("late", [False, True])
def test_a_compaction_killed_at_any_step_leaves_every_record_readable(tmp_path: Path, late: bool) -> None:
    path = tmp_path / "h.log"
    with LogDB(path) as db:
        db.insert_multiple({"n": n, "req_params": {"prompt": "p" * 100_000}} for n in range(13))
        db.update({"late": True}, doc_ids=[3, 5])
        db.remove(doc_ids=[4])
        expected = db.all()
    content = path.read_bytes()
    deaths = 0
    while compact_and_die(path, deaths, late=late):
        deaths += 1
        with LogDB(path) as db:
            assert db.all() == expected
            assert not db.storage.damaged  # type: ignore[attr-defined]
            assert not path.with_name("h.log.tmp").exists()
            db.insert({"n": "after"})
        with LogDB(path, read_only=True) as db:
            assert db.all()[-1] == {"n": "after"}
        path.write_bytes(content)
    assert deaths >= 10, "the compaction made fewer calls than known"
    assert len(path.read_bytes()) < len(content)
