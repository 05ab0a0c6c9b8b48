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
from contextlib import aclosing
from typing import Protocol

from modules.choices import Source, TaskStatus
from modules.control import Action
from modules.errors import FocaleError, NotFound, QueueFull, WorkerDied
from modules.event_log import EventLog
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
from modules.preparation import NothingToPrepare, Preparer, events_from_thread, when_prepared, while_preparing
from modules.ranks import Rank, rank_between
from modules.record import Record
from modules.request import GenerationRequest, from_params, to_params

logger = logging.getLogger(__name__)

REMEMBERED_ENDED_JOBS = 100


class Engine(Protocol):
    """What runs tasks: a worker process, or a thread of this process in tests."""

    def begin(self) -> None:
        """Begin to get ready, before there is a loop; only sooner than `start` would."""

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


class Job:
    """One task in this server's memory: its request, its record and its event log.

    lacks: whether something must be prepared before it can run; None while nobody has looked.
    was_prepared: something was; it happens once in the life of a job.
    """

    def __init__(self, record: Record, request: GenerationRequest) -> None:
        self.record = record
        self.request = request
        self.log = EventLog()
        self.followers = 0
        self.wanted: Action | None = None
        self.lacks: bool | None = None
        self.was_prepared = False

    @property
    def task_id(self) -> str:
        """Id of the task."""
        return self.record.task_id

    @property
    def rank(self) -> Rank:
        """Place in the queue: where somebody put it; else interactive before batch, then by acceptance."""
        return self.record.place or (1 if self.request.priority == "batch" else 0, self.record.id)


class JobQueue:
    """Runs tasks one at a time, in order, and never forgets one it accepted."""

    def __init__(
        self,
        engine: Engine,
        store: RecordStore,
        *,
        preparer: Preparer | None = None,
        limit: int = 0,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """Make a queue that is not running yet.

        Args:
            preparer: gets ready what tasks lack, while tasks that lack nothing run.
            limit: most tasks that may wait; 0 for any number.
        """
        self._engine = engine
        self._store = store
        self._preparer = preparer or NothingToPrepare()
        self._limit = limit
        self._clock_ms = clock_ms
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._ended: OrderedDict[str, Job] = OrderedDict()
        self._jobs: dict[str, Job] = {}
        self._wake = asyncio.Event()
        self._look = asyncio.Event()
        self._paused = False
        self._only = ""
        self._accepting = asyncio.Lock()
        self._loop_tasks: list[asyncio.Task[None]] = []
        self._preparing: Job | None = None
        self._preparation: asyncio.Task[None] | None = None
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
    def preparing(self) -> Job | None:
        """The waiting task that something is fetched for."""
        return self._preparing if self._preparing and self._preparing.lacks else None

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

    def begin(self) -> None:
        """Let the engine load while the rest of the server is put together; `start` follows."""
        self._engine.begin()

    async def start(self) -> None:
        """Take up what an earlier server left, and begin to run tasks."""
        await self._engine.start()
        for record in await asyncio.to_thread(self._store.unfinished):
            await self._take_up(record)
        self._loop_tasks = [
            asyncio.create_task(self._run_forever(), name="focale-queue"),
            asyncio.create_task(self._prepare_forever(), name="focale-preparing"),
        ]

    async def close(self) -> None:
        """End the engine; what runs or waits stays stored and is taken up at the next start."""
        tasks = [*self._loop_tasks, *([self._preparation] if self._preparation else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._engine.close()

    # -- what callers can do ------------------------------------------------------------------------------------

    async def submit(
        self,
        request: GenerationRequest,
        *,
        source: Source,
        webhook_url: str = "",
        task_id: str = "",
        request_hash: str = "",
    ) -> Job:
        """Accept a task: it is stored durably when this returns.

        Args:
            task_id: 32 hexadecimal digits; drawn unless given. request_hash: see `Record`.
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
                    request_hash=request_hash,
                ),
            )
            job = Job(record, request)
            self._enqueue(job)
        self._ask_running_batch_to_yield(job)
        return job

    async def control(self, action: Action, task_id: str | None = None) -> Job | None:
        """Stop or skip a task, the one in work if none is named; None when there is nothing to act on.

        A waiting task is removed by stop; skip does not touch it, unless something is fetched for it: then there is
        nothing to draw with, and skip is stop.
        """
        job = self._jobs.get(task_id) if task_id else self._running or self.preparing
        if job is None or job.record.task_status.is_final:
            return None
        if job is self._running:
            if job.wanted != "stop":
                job.wanted = action
            self._engine.control(job.task_id, action)
            return job
        if job in self._waiting and (action == "stop" or (action == "skip" and job is self.preparing)):
            self._waiting.remove(job)
            await self._end_preparation(job)
            await self._happen(job, Stopped())
            return job
        return None

    def pause(self) -> None:
        """Start no further task until `resume`; the running one goes on."""
        self._paused = True

    def resume(self) -> None:
        """Go on starting tasks."""
        self._paused = False
        self._waiting_changed()

    def run_only(self, task_id: str) -> None:
        """Start and prepare no other task than this one, whether it is accepted already or not."""
        self._only = task_id

    async def move(self, task_id: str, position: int) -> Job:
        """Put a waiting task at `position` (0 = next) of the waiting list; its place survives a restart.

        Raises:
            NotFound: no such task waits.
        """
        async with self._accepting:
            job = self._waiting_job(task_id)
            place = self._place_at(position, [other.rank for other in self._waiting if other is not job])
            if place is None:
                return job
            await asyncio.to_thread(self._store.update, task_id, place=place)
            self._waiting.remove(self._waiting_job(task_id))
            job.record = job.record.model_copy(update={"place": place})
            self._insert(job)
        self._waiting_changed()
        return job

    def _place_at(self, position: int, others: list[Rank]) -> Rank | None:
        """The rank that puts a task behind `position` of the others, given in order; None when there are none.

        What runs stays before it all, should it have to start again.
        """
        ahead = [self._running.rank] if self._running else []
        before = others[: max(0, position)][-1:] or [rank for rank in ahead if others and rank < others[0]]
        behind = others[max(0, position) :][:1]
        return rank_between(before[0] if before else None, behind[0] if behind else None)

    def _waiting_job(self, task_id: str) -> Job:
        job = next((waiting for waiting in self._waiting if waiting.task_id == task_id), None)
        if job is None:
            raise NotFound(f"Task {task_id} is not waiting.")
        return job

    def _insert(self, job: Job) -> int:
        """Put a job among the waiting ones by its rank; gives how many are before it."""
        index = next((i for i, other in enumerate(self._waiting) if other.rank > job.rank), len(self._waiting))
        self._waiting.insert(index, job)
        return index

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
        job.log.append(Queued(self._insert(job) + (1 if self._running else 0)))
        self._waiting_changed()

    def _waiting_changed(self) -> None:
        """Let both loops look at the waiting tasks again."""
        self._wake.set()
        self._look.set()

    def _ask_running_batch_to_yield(self, job: Job) -> None:
        running = self._running
        if running and running.request.priority == "batch" and job.request.priority == "interactive":
            self._engine.control(running.task_id, "yield")

    async def _run_forever(self) -> None:
        while True:
            self._wake.clear()
            job = await self._next_ready()
            if job is None:
                await self._wake.wait()
                continue
            self._waiting.remove(job)
            await self._run_one(job)

    async def _next_ready(self) -> Job | None:
        """The first waiting task that lacks nothing, None if there is none or the queue is paused."""
        while True:
            job = next((job for job in self._candidates() if not job.lacks), None)
            if job is None or job.lacks is False:
                return job
            await self._look_what_lacks(job)

    def _candidates(self) -> list[Job]:
        """The waiting tasks that may be started or prepared now, next one first."""
        if self._paused:
            return []
        return [job for job in self._waiting if not self._only or job.task_id == self._only]

    async def _run_one(self, job: Job) -> None:
        """Run one attempt of a task, and decide what follows when the attempt was lost."""
        self._running = job
        logger.info("Task %s starts (attempt %d)", job.task_id, job.record.attempts + 1)
        try:
            await self._happen(job, Started(job.record.attempts + 1))
            async for event in self._engine.run(job.record):
                await self._happen(job, when_prepared(event) if job.was_prepared else event)
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

    # -- inside: preparing --------------------------------------------------------------------------------------

    async def _look_what_lacks(self, job: Job) -> None:
        """Find out whether a task lacks something; what was prepared once is not looked at again."""
        try:
            needed = not job.was_prepared and await asyncio.to_thread(self._preparer.is_needed, job.record)
        except Exception:  # the run will tell what is wrong, better than this could
            logger.exception("It is not known what task %s lacks", job.task_id)
            needed = False
        job.lacks = needed
        if needed:
            self._look.set()

    async def _prepare_forever(self) -> None:
        """Get ready, one after the other, what waiting tasks lack."""
        while True:
            self._look.clear()
            job = next((job for job in self._candidates() if job.lacks is not False), None)
            if job is None:
                await self._look.wait()
                continue
            if job.lacks is None:
                await self._look_what_lacks(job)
                continue
            self._preparing = job
            self._preparation = asyncio.create_task(self._prepare(job), name=f"focale-prepare-{job.task_id}")
            await asyncio.wait({self._preparation})
            self._preparing = self._preparation = None
            for other in self._waiting:
                if other.lacks:
                    other.lacks = None  # it may have lacked the same
            self._wake.set()

    async def _prepare(self, job: Job) -> None:
        """Get ready what one task lacks; a failure ends the task."""
        logger.info("Task %s is prepared", job.task_id)
        record = job.record
        try:
            job.was_prepared = True
            async with aclosing(
                events_from_thread(lambda control: self._preparer.run(record, control), "focale-preparing")
            ) as events:
                async for event in events:
                    await self._happen(job, while_preparing(event))
        except Exception as error:  # the queue must outlive any failure of one task
            if job not in self._waiting:
                return
            self._waiting.remove(job)
            if isinstance(error, FocaleError):
                await self._happen(job, Failed(str(error), type(error).__name__))
                return
            logger.exception("Task %s could not be prepared", job.task_id)
            await self._fail_quietly(job, error)

    async def _end_preparation(self, job: Job) -> None:
        """End the preparation of a task, if there is one, and wait until it says no more."""
        preparation = self._preparation
        if preparation is not None and self._preparing is job:
            preparation.cancel()
            await asyncio.gather(preparation, return_exceptions=True)

    # -- inside: ends and events --------------------------------------------------------------------------------

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
