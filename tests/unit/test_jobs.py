"""The queue: order, durability before telling, stop and skip, restart, priorities, followers."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator

import pytest

from modules.choices import Source, TaskStatus
from modules.errors import QueueFull, WorkerDied
from modules.event_log import EventLog
from modules.events import (
    Event,
    Failed,
    Finished,
    ImageSaved,
    Progress,
    Queued,
    Retrying,
    Started,
    Stopped,
    Yielded,
    is_final,
)
from modules.jobs import Job, JobQueue
from modules.record import Record
from modules.request import GenerationRequest


class MemoryStore:
    """Keeps records in memory and remembers every write."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.writes: list[tuple[str, str]] = []
        self.is_full = False

    def add(self, record: Record) -> Record:
        if self.is_full:
            raise OSError("disk full")
        stored = record.model_copy(update={"id": len(self.records) + 1})
        self.records[record.task_id] = stored
        self.writes.append((record.task_id, record.task_status.value))
        return stored

    def update(self, task_id: str, **changes: object) -> Record:
        if self.is_full:
            raise OSError("disk full")
        self.records[task_id] = self.records[task_id].model_copy(update=changes)
        self.writes.append((task_id, self.records[task_id].task_status.value))
        return self.records[task_id]

    def unfinished(self) -> list[Record]:
        return sorted((r for r in self.records.values() if not r.task_status.is_final), key=lambda r: r.id)


class ScriptedEngine:
    """Runs a task by handing out the events that the test puts in."""

    def __init__(self) -> None:
        self.scripts: defaultdict[str, asyncio.Queue[Event | Exception]] = defaultdict(asyncio.Queue)
        self.wishes: list[tuple[str, str]] = []
        self.taken: asyncio.Queue[Record] = asyncio.Queue()

    def begin(self) -> None: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def run(self, record: Record) -> AsyncIterator[Event]:
        self.taken.put_nowait(record)
        while True:
            event = await self.scripts[record.task_id].get()
            if isinstance(event, Exception):
                raise event
            yield event
            if is_final(event) or isinstance(event, Yielded):
                return

    def control(self, task_id: str, action: str) -> None:
        self.wishes.append((task_id, action))

    def say(self, job: Job, *events: Event | Exception) -> None:
        for event in events:
            self.scripts[job.task_id].put_nowait(event)


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
async def queue(engine: ScriptedEngine, store: MemoryStore) -> AsyncIterator[JobQueue]:
    queue = JobQueue(engine, store)
    await queue.start()
    yield queue
    await queue.close()


async def submit(queue: JobQueue, **params: object) -> Job:
    return await queue.submit(GenerationRequest.model_validate(params), source=Source.API)


async def ended(job: Job) -> list[Event]:
    return [event async for _number, event in job.log.follow()]


async def test_an_accepted_task_is_stored_before_its_id_is_known(queue: JobQueue, store: MemoryStore) -> None:
    job = await submit(queue, prompt="a cat")
    assert store.records[job.task_id].req_params["prompt"] == "a cat"


async def test_a_task_that_cannot_be_stored_is_not_accepted(queue: JobQueue, store: MemoryStore) -> None:
    store.is_full = True
    with pytest.raises(OSError, match="disk full"):
        await submit(queue)
    assert queue.waiting == []


async def test_tasks_run_one_at_a_time_in_order(queue: JobQueue, engine: ScriptedEngine) -> None:
    first, second = await submit(queue), await submit(queue)
    assert (await engine.taken.get()).task_id == first.task_id
    assert queue.position(second.task_id) == 1
    engine.say(first, Finished())
    await ended(first)
    assert (await engine.taken.get()).task_id == second.task_id
    engine.say(second, Finished())
    assert [type(event) for event in await ended(second)] == [Queued, Started, Finished]


async def test_every_state_is_stored_before_followers_hear_of_it(
    queue: JobQueue, engine: ScriptedEngine, store: MemoryStore
) -> None:
    job = await submit(queue)
    engine.say(job, ImageSaved("d/a.png", 0, 1, 64, 64), Finished())
    expected = {Queued: "pending", Started: "running", ImageSaved: "running", Finished: "finished"}
    async for _number, event in job.log.follow():
        assert (job.task_id, expected[type(event)]) in store.writes
    assert store.records[job.task_id].result == ("d/a.png",)


async def test_a_late_follower_hears_everything_but_stale_progress(queue: JobQueue, engine: ScriptedEngine) -> None:
    job = await submit(queue)
    engine.say(job, Progress(10, "one"), Progress(20, "two"), ImageSaved("d/a.png", 0, 1, 64, 64), Finished())
    await ended(job)
    assert [type(event).__name__ for event in await ended(job)] == [
        "Queued", "Started", "Progress", "ImageSaved", "Finished",
    ]  # fmt: skip
    assert job.log.progress == Progress(20, "two")


def test_an_ended_task_keeps_its_last_step_but_not_the_picture_of_it() -> None:
    log = EventLog()
    log.append(Progress(40, "half way", preview=b"jpeg", step=12))
    log.append(Finished())
    assert log.progress == Progress(40, "half way", preview=None, step=12)


async def test_a_follower_can_resume_after_a_number(queue: JobQueue, engine: ScriptedEngine) -> None:
    job = await submit(queue)
    engine.say(job, ImageSaved("d/a.png", 0, 1, 64, 64), ImageSaved("d/b.png", 1, 2, 64, 64), Finished())
    numbered = [(number, event) async for number, event in job.log.follow()]
    resume_after = next(number for number, event in numbered if isinstance(event, ImageSaved))
    rest = [(number, event) async for number, event in job.log.follow(resume_after)]
    assert rest == [pair for pair in numbered if pair[0] > resume_after]


async def test_two_hundred_followers_all_hear_the_end(queue: JobQueue, engine: ScriptedEngine) -> None:
    job = await submit(queue)
    followers = [asyncio.create_task(ended(job)) for _ in range(200)]
    await asyncio.sleep(0)
    engine.say(job, ImageSaved("d/a.png", 0, 1, 64, 64), Finished())
    for events in await asyncio.gather(*followers):
        assert [type(event) for event in events if not isinstance(event, Progress)] == [
            Queued, Started, ImageSaved, Finished,
        ]  # fmt: skip


async def test_stop_of_a_waiting_task_removes_it(queue: JobQueue, engine: ScriptedEngine) -> None:
    first, second = await submit(queue), await submit(queue)
    await engine.taken.get()
    assert await queue.control("stop", second.task_id) is second
    assert isinstance((await ended(second))[-1], Stopped)
    assert queue.waiting == []
    engine.say(first, Finished())
    await ended(first)


async def test_stop_without_a_name_reaches_the_running_task(queue: JobQueue, engine: ScriptedEngine) -> None:
    job = await submit(queue)
    await engine.taken.get()
    assert await queue.control("stop") is job
    assert engine.wishes == [(job.task_id, "stop")]
    engine.say(job, Stopped())
    await ended(job)
    assert await queue.control("stop") is None


async def test_a_task_whose_worker_died_runs_again_once(queue: JobQueue, engine: ScriptedEngine) -> None:
    job = await submit(queue)
    engine.say(job, WorkerDied("gone"), Finished())
    events = await ended(job)
    assert [type(event) for event in events if not isinstance(event, Queued)] == [Started, Retrying, Started, Finished]
    assert job.record.attempts == 2


async def test_a_task_that_kills_the_worker_twice_ends_with_the_reason(queue: JobQueue, engine: ScriptedEngine) -> None:
    job = await submit(queue)
    engine.say(job, WorkerDied("exit code -9"), WorkerDied("exit code -9"))
    last = (await ended(job))[-1]
    assert isinstance(last, Failed)
    assert "exit code -9" in last.error
    assert job.record.task_status is TaskStatus.ERROR


async def test_a_stopped_task_whose_worker_dies_is_not_started_again(queue: JobQueue, engine: ScriptedEngine) -> None:
    job = await submit(queue)
    await engine.taken.get()
    await queue.control("stop")
    engine.say(job, WorkerDied("killed"))
    assert isinstance((await ended(job))[-1], Stopped)


async def test_a_failure_of_one_task_does_not_hurt_the_next(queue: JobQueue, engine: ScriptedEngine) -> None:
    first, second = await submit(queue), await submit(queue)
    engine.say(first, RuntimeError("boom"))
    engine.say(second, Finished())
    assert isinstance((await ended(first))[-1], Failed)
    assert isinstance((await ended(second))[-1], Finished)


async def test_a_full_disk_ends_the_task_and_not_the_queue(
    queue: JobQueue, engine: ScriptedEngine, store: MemoryStore
) -> None:
    first = await submit(queue)
    await engine.taken.get()
    store.is_full = True
    engine.say(first, Finished())
    last = (await ended(first))[-1]
    assert isinstance(last, Failed)
    assert "disk full" in last.error
    store.is_full = False
    second = await submit(queue)
    engine.say(second, Finished())
    assert isinstance((await ended(second))[-1], Finished)


async def test_a_queue_with_a_limit_says_when_it_is_full(engine: ScriptedEngine, store: MemoryStore) -> None:
    queue = JobQueue(engine, store, limit=1)
    await queue.start()
    running = await submit(queue)
    await engine.taken.get()
    await submit(queue)
    with pytest.raises(QueueFull, match="the limit is 1"):
        await submit(queue)
    engine.say(running, Finished())
    await queue.close()


async def test_a_new_server_takes_up_what_the_old_one_left(engine: ScriptedEngine, store: MemoryStore) -> None:
    old = JobQueue(engine, store)
    await old.start()
    running, waiting = await submit(old, prompt="one"), await submit(old, prompt="two")
    await engine.taken.get()
    await old.close()
    engine.scripts.clear()

    new = JobQueue(engine, store)
    await new.start()
    assert (await engine.taken.get()).task_id == running.task_id
    again = new.get(running.task_id)
    assert again is not None
    assert again.record.attempts == 2
    engine.say(running, Finished())
    await ended(again)
    assert (await engine.taken.get()).task_id == waiting.task_id
    engine.say(waiting, Finished())
    taken_up = new.get(waiting.task_id)
    assert taken_up is not None
    await ended(taken_up)
    assert {record.task_status for record in store.records.values()} == {TaskStatus.FINISHED}
    await new.close()


async def test_a_task_that_was_lost_with_two_servers_is_an_error(engine: ScriptedEngine, store: MemoryStore) -> None:
    store.add(Record(task_id="b" * 32, task_status=TaskStatus.RUNNING, attempts=2, in_queue_mills=1, start_mills=1))
    queue = JobQueue(engine, store)
    await queue.start()
    assert store.records["b" * 32].task_status is TaskStatus.ERROR
    assert "ended twice" in store.records["b" * 32].error
    await queue.close()


async def test_interactive_tasks_go_before_batch_tasks(queue: JobQueue, engine: ScriptedEngine) -> None:
    running = await submit(queue)
    await engine.taken.get()
    batch = await submit(queue, priority="batch")
    interactive = await submit(queue)
    assert [job.task_id for job in queue.waiting] == [interactive.task_id, batch.task_id]
    engine.say(running, Finished())
    engine.say(interactive, Finished())
    engine.say(batch, Finished())
    await ended(batch)


async def test_a_running_batch_yields_and_goes_on_later(queue: JobQueue, engine: ScriptedEngine) -> None:
    batch = await submit(queue, priority="batch", image_number=2)
    await engine.taken.get()
    interactive = await submit(queue)
    assert engine.wishes == [(batch.task_id, "yield")]
    engine.say(batch, ImageSaved("d/a.png", 0, 1, 64, 64), Yielded())
    assert (await engine.taken.get()).task_id == interactive.task_id
    engine.say(interactive, Finished())
    resumed = await engine.taken.get()
    assert (resumed.task_id, resumed.settled) == (batch.task_id, (0,))
    engine.say(batch, ImageSaved("d/b.png", 1, 2, 64, 64), Finished())
    await ended(batch)
    assert batch.record.result == ("d/a.png", "d/b.png")


async def test_a_paused_queue_starts_nothing_until_resumed(queue: JobQueue, engine: ScriptedEngine) -> None:
    queue.pause()
    job = await submit(queue)
    await asyncio.sleep(0.01)
    assert engine.taken.empty()
    assert queue.running is None
    engine.say(job, Finished())
    queue.resume()
    assert isinstance((await ended(job))[-1], Finished)


async def test_waiting_tasks_can_be_reordered(queue: JobQueue, engine: ScriptedEngine) -> None:
    running = await submit(queue)
    await engine.taken.get()
    second, third = await submit(queue), await submit(queue)
    await queue.move(third.task_id, 0)
    assert [job.task_id for job in queue.waiting] == [third.task_id, second.task_id]
    for job in (running, second, third):
        engine.say(job, Finished())
    await asyncio.gather(ended(second), ended(third))


async def test_a_broken_listener_hurts_nobody(queue: JobQueue, engine: ScriptedEngine) -> None:
    def broken(job: Job, event: Event) -> None:
        raise RuntimeError("listener")

    queue.on_event(broken)
    job = await submit(queue)
    engine.say(job, Finished())
    assert isinstance((await ended(job))[-1], Finished)
