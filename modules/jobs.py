"""The queue: accepts tasks, runs one at a time, and keeps one event log per task that anyone may follow.

The queue knows no web framework and no engine internals: an `Engine` runs a task and yields events, a `RecordStore`
keeps records. Every transition is stored before it is told.
"""

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from modules.choices import Source, TaskStatus
from modules.control import Action
from modules.errors import FocaleError, NotFound, QueueFull, WorkerDied
from modules.events import (
    Event,
    Failed,
    Progress,
    Queued,
    Retrying,
    Started,
    Stopped,
    Yielded,
    is_final,
)
from modules.lifecycle import MAX_ATTEMPTS, after, may_happen
from modules.record import Record
from modules.request import GenerationRequest, from_params, to_params

logger = logging.getLogger(__name__)

REMEMBERED_ENDED_JOBS = 100


class Engine(Protocol):
    """What runs tasks: a worker process, or a thread of this process in tests."""

    async def start(self) -> None:
        """Make the engine ready; returns before models are loaded."""

    def run(self, record: Record) -> AsyncIterator[Event]:
        """Run one task; yields events up to a final one, or `Yielded`.

        Raises:
            WorkerDied: the process that ran it is gone.
        """

    def control(self, task_id: str, action: Action) -> None:
        """Ask the running task to stop, to skip the image in work, or to yield before the next image."""

    async def close(self) -> None:
        """End the engine and whatever it runs."""


class RecordStore(Protocol):
    """What keeps records durably; calls block and are made from threads."""

    def add(self, record: Record) -> Record:
        """Store a new record and return it with its id."""

    def update(self, task_id: str, **changes: object) -> Record:
        """Change fields of a stored record."""

    def unfinished(self) -> list[Record]:
        """Records that are pending or running, oldest first."""


class EventLog:
    """An append-only list of events that any number of followers read from any point.

    Every event has a number, starting at 1. `Progress` is kept only in its newest form; all else is lossless.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[int, Event]] = []
        self._progress: tuple[int, Progress] | None = None
        self._last = 0
        self._changed = asyncio.Event()

    @property
    def progress(self) -> Progress | None:
        """The newest progress of the task."""
        return self._progress[1] if self._progress else None

    @property
    def is_closed(self) -> bool:
        """True once the final event is in."""
        return bool(self._kept) and is_final(self._kept[-1][1])

    def append(self, event: Event) -> None:
        """Add an event and wake every follower."""
        self._last += 1
        if isinstance(event, Progress):
            self._progress = (self._last, event)
        else:
            self._kept.append((self._last, event))
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def follow(self, after_number: int = 0) -> AsyncIterator[tuple[int, Event]]:
        """Yield (number, event) in order, from the first event after `after_number`, up to the final one."""
        seen, position = after_number, 0
        while True:
            changed = self._changed
            while position < len(self._kept) and self._kept[position][0] <= seen:
                position += 1
            upcoming = self._kept[position] if position < len(self._kept) else None
            newest = self._progress if self._progress and self._progress[0] > seen else None
            if newest and (upcoming is None or newest[0] < upcoming[0]):
                upcoming = newest
            if upcoming is None:
                if self.is_closed:
                    return
                await changed.wait()
                continue
            seen = upcoming[0]
            yield upcoming
            if is_final(upcoming[1]):
                return


class Job:
    """One task in this server's memory: its request, its record and its event log."""

    def __init__(self, record: Record, request: GenerationRequest) -> None:
        self.record = record
        self.request = request
        self.log = EventLog()
        self.followers = 0
        self.wanted: Action | None = None

    @property
    def task_id(self) -> str:
        """Id of the task."""
        return self.record.task_id

    @property
    def rank(self) -> tuple[int, int]:
        """Place in the queue: interactive before batch, then by acceptance."""
        return (1 if self.request.priority == "batch" else 0, self.record.id)


class JobQueue:
    """Runs tasks one at a time, in order, and never forgets one it accepted."""

    def __init__(
        self,
        engine: Engine,
        store: RecordStore,
        *,
        limit: int = 0,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """Make a queue that is not running yet.

        Args:
            limit: most tasks that may wait; 0 for any number.
        """
        self._engine = engine
        self._store = store
        self._limit = limit
        self._clock_ms = clock_ms
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._jobs: dict[str, Job] = {}
        self._wake = asyncio.Event()
        self._paused = False
        self._accepting = asyncio.Lock()
        self._loop_task: asyncio.Task[None] | None = None
        self._listeners: list[Callable[[Job, Event], None]] = []

    # -- for those who watch ------------------------------------------------------------------------------------

    @property
    def running(self) -> Job | None:
        """The task in work."""
        return self._running

    @property
    def waiting(self) -> list[Job]:
        """Waiting tasks, next one first."""
        return list(self._waiting)

    @property
    def is_paused(self) -> bool:
        """True while no new task is started."""
        return self._paused

    def get(self, task_id: str) -> Job | None:
        """A task that waits, runs, or ended lately."""
        return self._jobs.get(task_id)

    def position(self, task_id: str) -> int:
        """Tasks ahead of a waiting one, the running one included; 0 when it runs or has ended."""
        for index, job in enumerate(self._waiting):
            if job.task_id == task_id:
                return index + (1 if self._running else 0)
        return 0

    def on_event(self, listener: Callable[[Job, Event], None]) -> None:
        """Call `listener` for every event of every task, after it is stored and before followers see it."""
        self._listeners.append(listener)

    # -- life of the queue --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up what an earlier server left, and begin to run tasks."""
        await self._engine.start()
        for record in await asyncio.to_thread(self._store.unfinished):
            await self._take_up(record)
        self._loop_task = asyncio.create_task(self._run_forever(), name="focale-queue")

    async def close(self) -> None:
        """End the engine; what runs or waits stays stored and is taken up at the next start."""
        if self._loop_task:
            self._loop_task.cancel()
            await asyncio.gather(self._loop_task, return_exceptions=True)
        await self._engine.close()

    # -- what callers can do ------------------------------------------------------------------------------------

    async def submit(
        self, request: GenerationRequest, *, source: Source, webhook_url: str = "", task_id: str = ""
    ) -> Job:
        """Accept a task: it is stored durably when this returns.

        Raises:
            QueueFull: as many tasks wait as the queue may hold.
        """
        async with self._accepting:
            if self._limit and len(self._waiting) >= self._limit:
                raise QueueFull(f"The queue is full: {len(self._waiting)} tasks wait and the limit is {self._limit}.")
            record = await asyncio.to_thread(
                self._store.add,
                Record(
                    task_id=task_id or uuid.uuid4().hex,
                    req_params=to_params(request),
                    in_queue_mills=self._clock_ms(),
                    source=source,
                    webhook_url=webhook_url,
                ),
            )
            job = Job(record, request)
            self._enqueue(job)
        self._ask_running_batch_to_yield(job)
        return job

    async def control(self, action: Action, task_id: str | None = None) -> Job | None:
        """Stop or skip a task, the running one if none is named; None when there is nothing to act on.

        A waiting task is removed by stop; skip does not touch it.
        """
        job = self._jobs.get(task_id) if task_id else self._running
        if job is None or job.record.task_status.is_final:
            return None
        if job is self._running:
            if job.wanted != "stop":
                job.wanted = action
            self._engine.control(job.task_id, action)
            return job
        if action == "stop" and job in self._waiting:
            self._waiting.remove(job)
            await self._happen(job, Stopped())
            return job
        return None

    def pause(self) -> None:
        """Start no further task until `resume`; the running one goes on."""
        self._paused = True

    def resume(self) -> None:
        """Go on starting tasks."""
        self._paused = False
        self._wake.set()

    def move(self, task_id: str, position: int) -> None:
        """Put a waiting task at `position` (0 = next) of the waiting list.

        Raises:
            NotFound: no such task waits.
        """
        job = next((waiting for waiting in self._waiting if waiting.task_id == task_id), None)
        if job is None:
            raise NotFound(f"Task {task_id} is not waiting.")
        self._waiting.remove(job)
        self._waiting.insert(max(0, position), job)

    def forget(self, task_id: str) -> None:
        """Drop an ended task from memory, because its record was deleted."""
        if self._ended.pop(task_id, None):
            self._jobs.pop(task_id, None)

    # -- inside -------------------------------------------------------------------------------------------------

    async def _take_up(self, record: Record) -> None:
        """Queue a record that an earlier server left unfinished; a task that was lost twice ends with an error."""
        try:
            job = Job(record, from_params(record.req_params))
        except ValueError as error:
            job = Job(record, GenerationRequest())
            self._jobs[job.task_id] = job
            await self._happen(job, Failed(f"The stored request can no longer be read: {error}", "InvalidRequest"))
            return
        self._jobs[job.task_id] = job
        if record.task_status is TaskStatus.RUNNING:
            if record.attempts >= MAX_ATTEMPTS:
                await self._happen(job, Failed("The server ended twice while this task ran.", "WorkerDied"))
                return
            await self._happen(job, Retrying("the server ended while it ran"))
        self._enqueue(job)

    def _enqueue(self, job: Job) -> None:
        self._jobs[job.task_id] = job
        index = next((i for i, other in enumerate(self._waiting) if other.rank > job.rank), len(self._waiting))
        self._waiting.insert(index, job)
        job.log.append(Queued(index + (1 if self._running else 0)))
        self._wake.set()

    def _ask_running_batch_to_yield(self, job: Job) -> None:
        running = self._running
        if running and running.request.priority == "batch" and job.request.priority == "interactive":
            self._engine.control(running.task_id, "yield")

    async def _run_forever(self) -> None:
        while True:
            self._wake.clear()
            if self._waiting and not self._paused:
                await self._run_one(self._waiting.pop(0))
            else:
                await self._wake.wait()

    async def _run_one(self, job: Job) -> None:
        """Run one attempt of a task, and decide what follows when the attempt was lost."""
        self._running = job
        logger.info("Task %s starts (attempt %d)", job.task_id, job.record.attempts + 1)
        try:
            await self._happen(job, Started(job.record.attempts + 1))
            async for event in self._engine.run(job.record):
                await self._happen(job, event)
            if job.record.task_status is TaskStatus.RUNNING:
                await self._happen(job, Failed("The worker ended the task without a result.", "EngineFailed"))
        except WorkerDied as error:
            await self._lost(job, str(error))
        except FocaleError as error:
            await self._happen(job, Failed(str(error), type(error).__name__))
        except Exception as error:  # the queue must outlive any failure of one task
            logger.exception("Task %s failed", job.task_id)
            await self._fail_quietly(job, error)
        finally:
            self._running = None
        if job.record.task_status is TaskStatus.PENDING:
            self._enqueue(job)

    async def _lost(self, job: Job, reason: str) -> None:
        """A worker died in this task: the task starts again once, unless someone asked to stop it."""
        if job.wanted == "stop":
            await self._happen(job, Stopped())
        elif job.record.attempts >= MAX_ATTEMPTS:
            await self._happen(job, Failed(f"The worker died twice in this task: {reason}", "WorkerDied"))
        else:
            await self._happen(job, Retrying(reason))

    async def _fail_quietly(self, job: Job, error: Exception) -> None:
        """Tell followers of a failure even when it cannot be stored; the record is mended at the next start."""
        event = Failed(f"{type(error).__name__}: {error}", type(error).__name__)
        try:
            await self._happen(job, event)
        except Exception:
            logger.exception("The end of task %s could not be stored", job.task_id)
            if may_happen(job.record, event):
                job.record = after(job.record, event, self._clock_ms())
            self._tell(job, event)

    async def _happen(self, job: Job, event: Event) -> None:
        """Let an event happen to a task: next record, stored, then told."""
        record = after(job.record, event, self._clock_ms())
        if not isinstance(event, Progress):
            changes = {
                name: getattr(record, name)
                for name in Record.model_fields
                if getattr(record, name) != getattr(job.record, name)
            }
            if changes:
                await asyncio.to_thread(self._store.update, job.task_id, **changes)
        job.record = record
        self._tell(job, event)

    def _tell(self, job: Job, event: Event) -> None:
        for listener in self._listeners:
            try:
                listener(job, event)
            except Exception:  # one listener's failure must not hurt the task or the others
                logger.exception("A listener failed on %s of task %s", type(event).__name__, job.task_id)
        if is_final(event):
            logger.info("Task %s ends: %s", job.task_id, job.record.task_status.value)
            self._remember_ended(job)
        elif isinstance(event, Yielded):
            logger.info("Task %s yields to a task of higher priority", job.task_id)
        job.log.append(event)

    def _remember_ended(self, job: Job) -> None:
        self._ended[job.task_id] = job
        while len(self._ended) > REMEMBERED_ENDED_JOBS:
            task_id, _job = self._ended.popitem(last=False)
            self._jobs.pop(task_id, None)
