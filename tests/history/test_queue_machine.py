"""Any order of submit, start, progress, skip, stop, crash, restart and delete leaves queue and history in agreement."""

import asyncio
import shutil
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from modules.choices import Source, TaskStatus
from modules.control import Action
from modules.errors import WorkerDied
from modules.events import Event, Failed, Finished, ImageSaved, ImageSkipped, Progress, Stopped, Yielded, is_final
from modules.history import History
from modules.jobs import JobQueue
from modules.record import Record
from modules.request import GenerationRequest

T = TypeVar("T")


class ManualEngine:
    """An engine whose events the machine hands out one by one."""

    def __init__(self) -> None:
        self.inboxes: defaultdict[str, asyncio.Queue[Event | WorkerDied]] = defaultdict(asyncio.Queue)
        self.wishes: list[tuple[str, Action]] = []
        self.waits_for = ""

    def begin(self) -> None: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def run(self, record: Record) -> AsyncIterator[Event]:
        inbox = self.inboxes[record.task_id] = asyncio.Queue()
        while True:
            self.waits_for = record.task_id
            event = await inbox.get()
            self.waits_for = ""
            if isinstance(event, WorkerDied):
                raise event
            yield event
            if is_final(event) or isinstance(event, Yielded):
                return

    def control(self, task_id: str, action: Action) -> None:
        self.wishes.append((task_id, action))


class QueueMachine(RuleBasedStateMachine):
    """Drives a real queue over a real history."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="focale-machine-"))
        self.loop = asyncio.new_event_loop()
        self.accepted: list[str] = []
        self.deleted: set[str] = set()
        self._boot()

    def _boot(self) -> None:
        self.history = History(self.folder, sync="off")
        self.engine = ManualEngine()
        self.queue = JobQueue(self.engine, self.history)
        self._do(self.queue.start)

    def _do(self, call: Callable[..., Coroutine[Any, Any, T]], *args: object, **kwargs: object) -> T:
        """Run a coroutine, then let the queue's own task come to rest."""
        result = self.loop.run_until_complete(call(*args, **kwargs))
        self.loop.run_until_complete(self._settle())
        return result

    async def _settle(self) -> None:
        """Wait until the running task waits for its next event, or nothing is left to run."""
        async with asyncio.timeout(20):
            while not self._is_at_rest():
                await asyncio.sleep(0.001)

    def _is_at_rest(self) -> bool:
        running = self.queue.running
        if running is None:
            return not self.queue.waiting
        return self.engine.waits_for == running.task_id and self.engine.inboxes[running.task_id].empty()

    async def _hand(self, event: Event | WorkerDied) -> None:
        assert self.queue.running is not None
        self.engine.inboxes[self.queue.running.task_id].put_nowait(event)

    @rule(priority=st.sampled_from(["interactive", "batch"]), images=st.integers(1, 3))
    def submit(self, priority: str, images: int) -> None:
        request = GenerationRequest(priority=priority, image_number=images, image_seed=1)  # type: ignore[arg-type]
        job = self._do(self.queue.submit, request, source=Source.API)
        self.accepted.append(job.task_id)

    @precondition(lambda self: self.queue.running is not None)
    @rule(percent=st.integers(0, 100))
    def progress(self, percent: int) -> None:
        self._do(self._hand, Progress(percent, "Sampling step 1/2, image 1/1 ..."))

    @precondition(lambda self: self.queue.running is not None)
    @rule(skipped=st.booleans())
    def settle_image(self, skipped: bool) -> None:
        job = self.queue.running
        assert job is not None
        index = len(job.record.settled)
        if index < job.request.image_number:
            event = ImageSkipped(index) if skipped else ImageSaved(f"d/{job.task_id}-{index}.png", index, 1, 64, 64)
            self._do(self._hand, event)

    @precondition(lambda self: self.queue.running is not None)
    @rule(event=st.sampled_from([Finished(), Stopped(), Failed("no"), Yielded()]))
    def end_attempt(self, event: Event) -> None:
        self._do(self._hand, event)

    @precondition(lambda self: self.queue.running is not None)
    @rule()
    def crash_worker(self) -> None:
        self._do(self._hand, WorkerDied("exit code -9"))

    @rule(action=st.sampled_from(["stop", "skip"]), number=st.integers(0, 20))
    def control(self, action: Action, number: int) -> None:
        known = self.accepted
        self._do(self.queue.control, action, known[number % len(known)] if known and number % 3 else None)

    @rule()
    def crash_server(self) -> None:
        """The server is gone without a word; the next one reads what it left, and keeps the order."""
        waiting = [job.task_id for job in self.queue.waiting]
        running = [self.queue.running.task_id] if self.queue.running else []
        self.loop.run_until_complete(self.queue.close())
        self.history.close()
        self._boot()
        later = [job.task_id for job in [self.queue.running, *self.queue.waiting] if job is not None]
        assert [task_id for task_id in later if task_id not in running] == waiting

    @precondition(lambda self: bool(self.queue.waiting))
    @rule(number=st.integers(0, 9), position=st.integers(0, 9))
    def move(self, number: int, position: int) -> None:
        waiting = [job.task_id for job in self.queue.waiting]
        task_id = waiting.pop(number % len(waiting))
        self._do(self.queue.move, task_id, position)
        waiting.insert(position, task_id)
        assert [job.task_id for job in self.queue.waiting] == waiting

    @rule(number=st.integers(0, 20))
    def delete(self, number: int) -> None:
        known = [task_id for task_id in self.accepted if task_id not in self.deleted]
        if known:
            gone = self.history.delete([known[number % len(known)]])
            self.deleted.update(record.task_id for record in gone)
            for record in gone:
                self.queue.forget(record.task_id)

    @invariant()
    def every_accepted_task_has_one_record(self) -> None:
        stored = [record.task_id for record in self.history.page(page_size=None, statuses=tuple(TaskStatus))]
        assert sorted(stored) == sorted(set(self.accepted) - self.deleted)

    @invariant()
    def memory_and_disk_agree(self) -> None:
        for task_id in set(self.accepted) - self.deleted:
            stored = self.history.get(task_id)
            job = self.queue.get(task_id)
            assert stored is not None
            if job is not None:
                live = job.record.model_copy(update={"progress": stored.progress})
                assert live == stored
            else:
                assert stored.task_status.is_final

    @invariant()
    def states_and_queue_agree(self) -> None:
        waiting = {job.task_id for job in self.queue.waiting}
        running = {self.queue.running.task_id} if self.queue.running else set()
        for task_id in set(self.accepted) - self.deleted:
            record = self.history.get(task_id)
            assert record is not None
            assert (task_id in waiting) == (record.task_status is TaskStatus.PENDING)
            assert (task_id in running) == (record.task_status is TaskStatus.RUNNING)
            assert record.attempts <= 2

    def teardown(self) -> None:
        """Whatever happened, everything that still waits or runs can be finished."""
        while self.queue.running is not None:
            self._do(self._hand, Finished())
        unfinished = self.history.unfinished()
        self.loop.run_until_complete(self.queue.close())
        self.history.close()
        self.loop.close()
        shutil.rmtree(self.folder)
        assert unfinished == []


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(
    max_examples=50, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
