"""A writer that works until it is killed; run as a program by test_kill.py."""

import itertools
import os
import sys
from collections.abc import Iterator

from modules.history import History
from modules.record import Record

Step = tuple[str, int]


def steps_from(start: int) -> Iterator[Step]:
    """What the writer does, for ever: each task is added, runs and finishes; every third time one is deleted."""
    for number in itertools.count(start):
        yield from (("pending", number), ("running", number), ("finished", number))
        if number % 3 == 0 and number > start:
            yield ("deleted", number - 1)


def do(history: History, step: Step) -> None:
    status, number = step
    task_id = f"{number:032x}"
    if status == "pending":
        params = {"prompt": "p" * 2000, "n": number}
        history.add(Record(task_id=task_id, in_queue_mills=number, req_params=params))
    elif status == "running":
        history.update(task_id, task_status="running", attempts=1)
    elif status == "finished":
        history.update(task_id, task_status="finished", result=[f"{number}.png"], progress=100)
    else:
        assert [record.task_id for record in history.delete([task_id])] == [task_id]


def write_until_killed(folder: str, start: str) -> None:
    """Take one step after the other and write a byte to standard output when its call has returned."""
    history = History(folder)
    history.storage.compact_above = 1 << 14
    os.write(1, b"r")
    for step in steps_from(int(start)):
        do(history, step)
        os.write(1, b".")


if __name__ == "__main__":
    write_until_killed(*sys.argv[1:])
