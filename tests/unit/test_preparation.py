"""Preparing: a task waits for what it lacks, the others do not, and it can be stopped at any moment."""

import asyncio
import queue as threads
from collections.abc import AsyncIterator, Iterator

import pytest

from modules.choices import TaskStatus
from modules.control import Control
from modules.errors import DownloadFailed
from modules.events import Event, Failed, Finished, Noticed, Progress, Started, Stopped, is_final
from modules.jobs import Job, JobQueue
from modules.record import Record
from tests.unit.test_jobs import MemoryStore, ScriptedEngine, ended, submit


class ScriptedPreparer:
    """Gets ready what a test tells it to.

    missing: prompts of tasks that lack something. stopped: ids of tasks whose preparation was asked to stop.
    """

    def __init__(self) -> None:
        self.missing: set[str] = set()
        self.runs: list[str] = []
        self.stopped: threads.SimpleQueue[str] = threads.SimpleQueue()
        self._script: threads.SimpleQueue[Event | Exception | None] = threads.SimpleQueue()

    def is_needed(self, record: Record) -> bool:
        return record.req_params["prompt"] in self.missing

    def say(self, *events: Event | Exception | None) -> None:
        """Tell events; None ends the preparation well."""
        for event in events:
            self._script.put(event)

    def run(self, record: Record, control: Control) -> Iterator[Event]:
        self.runs.append(record.task_id)
        while True:
            try:
                event = self._script.get(timeout=0.01)
            except threads.Empty:
                try:
                    control.check()
                except Exception:
                    self.stopped.put(record.task_id)
                    raise
                continue
            if isinstance(event, Exception):
                raise event
            if event is None:
                self.missing.clear()
                return
            yield event


@pytest.fixture
def preparer() -> ScriptedPreparer:
    return ScriptedPreparer()


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
async def queue(engine: ScriptedEngine, store: MemoryStore, preparer: ScriptedPreparer) -> AsyncIterator[JobQueue]:
    queue = JobQueue(engine, store, preparer=preparer)
    await queue.start()
    yield queue
    await queue.close()


async def event_of(job: Job, kind: type[Event]) -> Event:
    """The first event of a kind."""
    async for _number, event in job.log.follow():
        if isinstance(event, kind):
            return event
    raise AssertionError(f"there was no {kind.__name__}")


async def test_a_task_is_prepared_first_and_both_halves_make_one_bar(
    queue: JobQueue, engine: ScriptedEngine, preparer: ScriptedPreparer
) -> None:
    preparer.missing = {"anime"}
    job = await submit(queue, prompt="anime")
    preparer.say(Progress(40, "Downloading"))
    assert await event_of(job, Progress) == Progress(20, "Downloading")
    assert (job.record.task_status, job.record.progress) == (TaskStatus.PENDING, 20)
    preparer.say(Progress(100, "Downloading"), Noticed("Downloaded it."), None)
    engine.say(job, Progress(0, "Loading models ..."), Progress(50, "half"), Finished())
    events = [event for event in await ended(job) if not isinstance(event, Progress)]
    assert [type(event).__name__ for event in events] == ["Queued", "Noticed", "Started", "Finished"]
    assert job.log.progress == Progress(75, "half")
    assert job.record.notes == ("Downloaded it.",)
    assert preparer.runs == [job.task_id]


async def test_progress_never_falls_from_the_preparation_to_the_run(
    queue: JobQueue, engine: ScriptedEngine, preparer: ScriptedPreparer
) -> None:
    preparer.missing = {"anime"}
    seen: list[float] = []
    queue.on_event(lambda job, _event: seen.append(job.record.progress))
    job = await submit(queue, prompt="anime")
    preparer.say(*(Progress(percent, "Downloading") for percent in range(0, 101, 10)), None)
    engine.say(job, *(Progress(percent, "Sampling") for percent in range(1, 100, 9)), Finished())
    await ended(job)
    assert seen == sorted(seen)
    assert seen[-1] == 100


async def test_tasks_that_lack_nothing_overtake(
    queue: JobQueue, engine: ScriptedEngine, preparer: ScriptedPreparer
) -> None:
    preparer.missing = {"anime"}
    slow = await submit(queue, prompt="anime")
    preparer.say(Progress(10, "Downloading"))
    await event_of(slow, Progress)
    quick = await submit(queue, prompt="a cat")
    engine.say(quick, Finished())
    await ended(quick)
    assert slow.record.task_status is TaskStatus.PENDING
    preparer.say(None)
    engine.say(slow, Finished())
    await ended(slow)


async def test_a_prepared_task_takes_its_old_place(
    queue: JobQueue, engine: ScriptedEngine, preparer: ScriptedPreparer
) -> None:
    preparer.missing = {"anime"}
    running = await submit(queue, prompt="long")
    await event_of(running, Started)
    slow, later = await submit(queue, prompt="anime"), await submit(queue, prompt="later")
    preparer.say(Progress(10, "Downloading"), None)
    await event_of(slow, Progress)
    while queue.preparing:
        await asyncio.sleep(0.01)
    for job in (running, slow, later):
        engine.say(job, Finished())
    await asyncio.gather(ended(running), ended(slow), ended(later))
    assert [record.req_params["prompt"] for record in _taken(engine)] == ["long", "anime", "later"]


def _taken(engine: ScriptedEngine) -> list[Record]:
    return [engine.taken.get_nowait() for _ in range(engine.taken.qsize())]


async def test_one_preparation_serves_all_tasks_that_lack_the_same(
    queue: JobQueue, engine: ScriptedEngine, preparer: ScriptedPreparer
) -> None:
    preparer.missing = {"anime"}
    jobs = [await submit(queue, prompt="anime") for _ in range(3)]
    preparer.say(Progress(1, "Downloading"))
    await event_of(jobs[0], Progress)
    preparer.say(None)
    for job in jobs:
        engine.say(job, Finished())
    await asyncio.gather(*map(ended, jobs))
    assert preparer.runs == [jobs[0].task_id]


async def test_a_preparation_that_fails_ends_its_task_only(
    queue: JobQueue, engine: ScriptedEngine, preparer: ScriptedPreparer
) -> None:
    preparer.missing = {"anime"}
    job = await submit(queue, prompt="anime")
    preparer.say(DownloadFailed("x could not be downloaded."))
    assert (await ended(job))[-1] == Failed("x could not be downloaded.", "DownloadFailed")
    other = await submit(queue, prompt="a cat")
    engine.say(other, Finished())
    assert isinstance((await ended(other))[-1], Finished)
    assert queue.waiting == []


async def test_an_unforeseen_failure_ends_its_task_only(
    queue: JobQueue, engine: ScriptedEngine, preparer: ScriptedPreparer
) -> None:
    preparer.missing = {"anime"}
    job = await submit(queue, prompt="anime")
    preparer.say(RuntimeError("odd"))
    assert (await ended(job))[-1] == Failed("RuntimeError: odd", "RuntimeError")
    other = await submit(queue, prompt="a cat")
    engine.say(other, Finished())
    assert isinstance((await ended(other))[-1], Finished)


@pytest.mark.parametrize("action", ["stop", "skip"])
@pytest.mark.parametrize("named", [True, False])
async def test_stop_and_skip_end_the_task_and_its_download(
    queue: JobQueue, preparer: ScriptedPreparer, action: str, named: bool
) -> None:
    preparer.missing = {"anime"}
    job = await submit(queue, prompt="anime")
    preparer.say(Progress(10, "Downloading"))
    await event_of(job, Progress)
    assert await queue.control(action, job.task_id if named else None) is job  # type: ignore[arg-type]
    assert isinstance((await ended(job))[-1], Stopped)
    assert await asyncio.to_thread(preparer.stopped.get, True, 5) == job.task_id
    assert job.record.task_status is TaskStatus.STOP


async def test_skip_leaves_a_task_alone_that_only_waits(queue: JobQueue, preparer: ScriptedPreparer) -> None:
    preparer.missing = {"anime"}
    first, second = await submit(queue, prompt="anime"), await submit(queue, prompt="anime")
    preparer.say(Progress(10, "Downloading"))
    await event_of(first, Progress)
    assert await queue.control("skip", second.task_id) is None
    assert second in queue.waiting


async def test_what_still_lacks_after_its_preparation_is_left_to_the_engine(
    queue: JobQueue, engine: ScriptedEngine, preparer: ScriptedPreparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparer, "is_needed", lambda _record: True)
    job = await submit(queue, prompt="anime")
    preparer.say(None)
    engine.say(job, Finished())
    assert isinstance((await ended(job))[-1], Finished)
    assert len(preparer.runs) == 1


async def test_a_paused_queue_prepares_nothing(
    queue: JobQueue, engine: ScriptedEngine, preparer: ScriptedPreparer
) -> None:
    preparer.missing = {"anime"}
    queue.pause()
    job = await submit(queue, prompt="anime")
    await asyncio.sleep(0.05)
    assert preparer.runs == []
    queue.resume()
    preparer.say(None)
    engine.say(job, Finished())
    await ended(job)


async def test_only_one_task_is_run_where_only_that_one_is_wanted(
    queue: JobQueue, engine: ScriptedEngine, preparer: ScriptedPreparer
) -> None:
    preparer.missing = {"anime"}
    queue.pause()
    others = [await submit(queue, prompt=prompt) for prompt in ("a cat", "anime")]
    queue.run_only("f" * 32)
    queue.resume()
    preparer.missing.add("mine")
    mine = await queue.submit(
        others[0].request.changed(prompt="mine"), source=others[0].record.source, task_id="f" * 32
    )
    preparer.say(Progress(10, "Downloading"), None)
    engine.say(mine, Finished())
    assert is_final((await ended(mine))[-1])
    await asyncio.sleep(0.05)
    assert preparer.runs == [mine.task_id]
    assert [job.record.task_status for job in others] == [TaskStatus.PENDING] * 2


async def test_a_closed_queue_leaves_the_task_pending_for_the_next_server(
    engine: ScriptedEngine, store: MemoryStore, preparer: ScriptedPreparer
) -> None:
    preparer.missing = {"anime"}
    queue = JobQueue(engine, store, preparer=preparer)
    await queue.start()
    job = await submit(queue, prompt="anime")
    preparer.say(Progress(10, "Downloading"))
    await event_of(job, Progress)
    await queue.close()
    assert await asyncio.to_thread(preparer.stopped.get, True, 5) == job.task_id
    assert store.records[job.task_id].task_status is TaskStatus.PENDING
    again = JobQueue(engine, store, preparer=preparer)
    await again.start()
    preparer.say(None)
    taken = again.get(job.task_id)
    assert taken is not None
    engine.say(taken, Finished())
    assert isinstance((await ended(taken))[-1], Finished)
    await again.close()
