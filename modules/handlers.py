"""The only door to generation: page, REST routes, Gradio client and command line all come through here."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from modules.choices import Source
from modules.control import Action
from modules.errors import IllegalTransition, NotFound
from modules.events import Event
from modules.history import History
from modules.jobs import Job, JobQueue
from modules.record import Record
from modules.request import GenerationRequest, normalised, with_resolved_seed

logger = logging.getLogger(__name__)


class RequestCheck(Protocol):
    """What refuses a request before anything is queued."""

    def __call__(self, request: GenerationRequest) -> None:
        """Raise `InvalidRequest` (or a subclass) naming the field, the value and the way out."""


class Tools(Protocol):
    """One-off work of the engine that is no task: describing a picture, finding a mask."""

    async def call(self, tool: str, payload: Mapping[str, Any]) -> object:
        """Run a tool and return its JSON-like answer."""


class Handlers:
    """Everything a caller can ask for, in the words of the application; knows no web framework."""

    def __init__(
        self,
        *,
        queue: JobQueue,
        history: History,
        check: RequestCheck,
        tools: Tools,
        output_root: Path,
        stop_when_abandoned: bool = False,
    ) -> None:
        """Bind the door to what stands behind it.

        Args:
            check: refuses requests that cannot be met.
            output_root: the folder that results are in.
            stop_when_abandoned: stop a task whose last follower goes away, unless its request says otherwise.
        """
        self._queue = queue
        self._history = history
        self._check = check
        self._tools = tools
        self._output_root = output_root
        self._stop_when_abandoned = stop_when_abandoned
        self._leaving: set[asyncio.Task[None]] = set()

    async def submit(
        self,
        request: GenerationRequest,
        *,
        source: Source,
        webhook_url: str = "",
        task_id: str = "",
        request_hash: str = "",
    ) -> Job:
        """Check and queue a request; its record is durable when this returns.

        Raises:
            InvalidRequest: a name is unknown, or the request asks for what this version cannot do.
            QueueFull: the queue has reached its limit.
        """
        request = with_resolved_seed(normalised(request))
        await asyncio.to_thread(self._check, request)
        return await self._queue.submit(
            request, source=source, webhook_url=webhook_url, task_id=task_id, request_hash=request_hash
        )

    async def generate(
        self, request: GenerationRequest, *, source: Source, webhook_url: str = ""
    ) -> AsyncIterator[Event]:
        """Submit a request and yield its events up to the final one."""
        job = await self.submit(request, source=source, webhook_url=webhook_url)
        async for _number, event in self.follow(job):
            yield event

    async def follow(self, job: Job, after_number: int = 0) -> AsyncIterator[tuple[int, Event]]:
        """Yield (number, event) of a task from any point; anyone may join at any time.

        When the last follower goes away before the end, the task runs on or stops as its request, else the server
        setting says.
        """
        job.followers += 1
        completed = False
        try:
            async for number, event in job.log.follow(after_number):
                yield number, event
            completed = True
        finally:
            job.followers -= 1
            if not completed and job.followers == 0:
                # A task of its own: the follower's is being cancelled, and must not take a half-done stop with it.
                leaving = asyncio.create_task(self._abandoned(job))
                self._leaving.add(leaving)
                leaving.add_done_callback(self._leaving.discard)

    async def finished_record(self, job: Job) -> Record:
        """Wait for a task's end and return its record."""
        async for _event in self.follow(job):
            pass
        return job.record

    async def control(self, action: Action, task_id: str | None = None) -> Job | None:
        """Stop a task, or skip its image in work; the running task if none is named. None: nothing to act on."""
        return await self._queue.control(action, task_id)

    async def record(self, task_id: str) -> Record:
        """The record of a task, live or from history.

        Raises:
            NotFound: there is no such task.
        """
        job = self._queue.get(task_id)
        if job is not None:
            return job.record
        record = self._history.at_hand(task_id) or await asyncio.to_thread(self._history.get, task_id)
        if record is None:
            raise NotFound(f"There is no task {task_id!r}.")
        return record

    async def delete(self, task_id: str) -> Record:
        """Delete an ended task: its record and its files.

        Raises:
            NotFound: there is no such task.
            IllegalTransition: the task waits or runs.
        """
        record = await self.record(task_id)
        if not record.task_status.is_final:
            raise IllegalTransition(f"Task {task_id} is {record.task_status.value}; stop it before deleting it.")
        await self.delete_many([task_id])
        return record

    async def delete_many(self, task_ids: Iterable[str]) -> list[Record]:
        """Delete the ended ones of these tasks: first their files, then their records; returns the deleted records."""
        deleted = await asyncio.to_thread(self._delete, list(task_ids))
        for record in deleted:
            self._queue.forget(record.task_id)
        return deleted

    def _delete(self, task_ids: list[str]) -> list[Record]:
        from modules.outputs import delete_picture  # what it brings along is not needed for starting

        for task_id in task_ids:
            record = self._history.get(task_id)
            if record is not None and record.task_status.is_final:
                for path in record.result:
                    delete_picture(self._output_root, path)
        return self._history.delete(task_ids)

    async def describe(self, image_path: str, kinds: tuple[str, ...]) -> str:
        """Words for a picture.

        Args:
            image_path: file to describe.
            kinds: "Photo", "Anime" or both.
        """
        answer = await self._tools.call("describe", {"image_path": image_path, "kinds": list(kinds)})
        return str(answer)

    async def generate_mask(self, image_path: str, options: Mapping[str, Any]) -> str:
        """Find a mask in a picture; returns the path of a PNG of the same size, white = selected."""
        return str(await self._tools.call("generate_mask", {"image_path": image_path, **options}))

    async def unload_models(self) -> None:
        """Free the memory that models take; the next task loads what it needs."""
        await self._tools.call("unload_models", {})

    async def _abandoned(self, job: Job) -> None:
        wants = job.request.on_disconnect
        is_to_stop = wants == "stop" or (not wants and self._stop_when_abandoned)
        if is_to_stop and not job.record.task_status.is_final:
            logger.info("Task %s is stopped because its last follower went away", job.task_id)
            await self._queue.control("stop", job.task_id)
