"""The state machine of a task: what may follow what, and what each event changes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.choices import TaskStatus
from modules.errors import IllegalTransition
from modules.events import (
    Event,
    Failed,
    Finished,
    ImageSaved,
    ImageSkipped,
    Noticed,
    Progress,
    Queued,
    Retrying,
    Skipped,
    Started,
    Stopped,
    Yielded,
    is_final,
)
from modules.lifecycle import after, may_happen
from modules.record import Record

PENDING = Record(task_id="a" * 32, id=1, in_queue_mills=1000)
RUNNING = after(PENDING, Started(1), 2000)

EVENTS: tuple[Event, ...] = (
    Queued(0),
    Started(1),
    Progress(50, "Sampling step 1/2, image 1/1 ..."),
    ImageSaved("2026-01-01/a.png", 0, 7, 64, 64),
    ImageSkipped(0),
    Noticed("hello"),
    Retrying("lost"),
    Yielded(),
    Finished(),
    Stopped(),
    Skipped(),
    Failed("no"),
)


def final_records() -> list[Record]:
    return [after(RUNNING, event, 3000) for event in EVENTS if is_final(event)]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_nothing_leads_out_of_a_final_state(event: Event) -> None:
    for record in final_records():
        assert not may_happen(record, event)
        with pytest.raises(IllegalTransition, match=record.task_id):
            after(record, event, 4000)


def test_a_waiting_task_makes_no_pictures() -> None:
    with pytest.raises(IllegalTransition, match="is pending"):
        after(PENDING, ImageSaved("a.png", 0, 1, 64, 64), 2000)


def test_a_running_task_cannot_start_again() -> None:
    with pytest.raises(IllegalTransition, match="is running"):
        after(RUNNING, Started(2), 3000)


def test_saved_images_keep_path_seed_and_number_together() -> None:
    record = after(RUNNING, ImageSaved("d/a.png", 0, 7, 144, 112), 3000)
    record = after(record, ImageSaved("d/b.png", 2, 9, 144, 112), 3001)
    assert (record.result, record.seeds, record.settled) == (("d/a.png", "d/b.png"), (7, 9), (0, 2))
    assert (record.width, record.height) == (144, 112)


def test_a_contact_sheet_settles_no_image() -> None:
    record = after(RUNNING, ImageSaved("d/grid.png", -1, 7, 288, 224), 3000)
    assert record.result == ("d/grid.png",)
    assert record.settled == ()


def test_progress_never_falls() -> None:
    record = after(RUNNING, Progress(60, "a"), 3000)
    assert after(record, Progress(40, "b"), 3000).progress == 60


def test_a_clock_that_jumps_back_ends_no_task_before_it_began() -> None:
    started = after(PENDING, Started(1), 5)
    ended = after(started, Finished(), 1)
    assert ended.in_queue_mills <= ended.start_mills <= ended.finish_mills


def test_a_lost_attempt_counts_and_a_yield_does_not() -> None:
    lost = after(RUNNING, Retrying("the worker died"), 3000)
    yielded = after(RUNNING, Yielded(), 3000)
    assert (lost.task_status, lost.attempts) == (TaskStatus.PENDING, 1)
    assert (yielded.task_status, yielded.attempts) == (TaskStatus.PENDING, 0)
    assert "Started again: the worker died" in lost.notes


def test_a_failure_keeps_the_progress_it_had_and_says_why() -> None:
    failed = after(after(RUNNING, Progress(30, "a"), 3000), Failed("disk full"), 4000)
    assert (failed.task_status, failed.progress, failed.error) == (TaskStatus.ERROR, 30, "disk full")


def test_the_same_notice_is_kept_once() -> None:
    record = after(RUNNING, Noticed("hello"), 3000)
    assert after(record, Noticed("hello"), 3000).notes == ("hello",)


@given(st.lists(st.sampled_from(EVENTS), max_size=30))
def test_any_legal_history_keeps_the_record_consistent(events: list[Event]) -> None:
    record, clock = PENDING, itertools.count(2000)
    for event in events:
        if not may_happen(record, event):
            continue
        record = after(record, event, next(clock))
        status = record.task_status
        assert len(record.result) == len(record.seeds)
        assert (record.finish_mills >= 0) == status.is_final
        assert (record.start_mills >= 0) or status is not TaskStatus.RUNNING
        assert 0 <= record.progress <= 100 or status is TaskStatus.PENDING
        assert bool(record.error) == (status is TaskStatus.ERROR)
