"""Runs tasks in a process of their own, so that models, crashes and long kernels never touch the web server.

Parent and child share one duplex pipe: tasks, wishes and tool calls go in, events and answers come out. The child ends
when the pipe closes, so no orphan is left behind.
"""

import asyncio
import contextlib
import gc
import itertools
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

from modules.control import Action, Control
from modules.errors import EngineFailed, FocaleError, WorkerDied
from modules.events import Event, Failed, is_final
from modules.loads import ModelLoad, listen, tell
from modules.record import Record

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 3.0
REST_AFTER_S = 20.0


class Workbench(Protocol):
    """What a worker holds: models and everything else that turns a record into events."""

    def warm_up(self) -> None:
        """Load what the first task will need."""

    def run(self, record: Record, control: Control) -> Iterator[Event]:
        """Run one task, ending with a final event or `Yielded`."""

    def call(self, tool: str, payload: Mapping[str, Any]) -> object:
        """Run a tool that is no task and return its answer."""

    def rest(self) -> None:
        """Give back what only work needs; called when nothing was asked for a while."""


MakeWorkbench = Callable[[], Workbench]


@dataclass(frozen=True, slots=True)
class _Run:
    record: Record


@dataclass(frozen=True, slots=True)
class _Call:
    number: int
    tool: str
    payload: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Wish:
    task_id: str
    action: Action


@dataclass(frozen=True, slots=True)
class _Happened:
    task_id: str
    event: Event


@dataclass(frozen=True, slots=True)
class _RunOver:
    task_id: str


@dataclass(frozen=True, slots=True)
class _Answer:
    number: int
    value: object = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class _CannotStart:
    reason: str


@dataclass(frozen=True, slots=True)
class _Ready:
    seconds: float


def failure_of(error: BaseException) -> Failed:
    """The one place that turns an exception of a run into the event that ends it."""
    if isinstance(error, FocaleError):
        return Failed(str(error), type(error).__name__)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return Failed(f"Not enough memory for this picture: {error}", "OutOfMemory")
    return Failed(f"{type(error).__name__}: {error}", type(error).__name__)


def events_of(workbench: MakeWorkbench, record: Record, control: Control) -> Iterator[Event]:
    """Run a task and end its events with a failure if the run raises; the traceback goes to the log."""
    try:
        yield from workbench().run(record, control)
    except Exception as error:  # the one place where a run's failure becomes an event
        logger.exception("Task %s failed in the worker", record.task_id)
        yield failure_of(error)


# -- the child ---------------------------------------------------------------------------------------------------


def serve_pipe(pipe: Connection, make_workbench: MakeWorkbench) -> None:
    """Body of the worker process: run what comes through the pipe until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.disable()  # nothing that is imported is garbage; looking for some takes a tenth of the start
    controls: dict[str, Control] = {}
    inbox: queue.SimpleQueue[_Run | _Call] = queue.SimpleQueue()
    sending = threading.Lock()

    def send(message: object) -> None:
        with sending:
            try:
                pipe.send(message)
            except (BrokenPipeError, OSError):
                os._exit(0)  # the server is gone; nobody is left to tell

    threading.Thread(target=_hear, args=(pipe, inbox, controls), name="focale-wishes", daemon=True).start()
    listen(send)
    began = time.perf_counter()
    try:
        workbench = make_workbench()
    except Exception as error:  # told as the reason of the death, since nothing can run
        logger.exception("The worker cannot start")
        send(_CannotStart(f"{type(error).__name__}: {error}"))
        return
    gc.freeze()  # before models are loaded: these are given up again
    gc.enable()
    try:
        workbench.warm_up()
    except Exception:  # a model that cannot be loaded is told by the task that needs it
        logger.exception("The worker could not warm up")
    send(_Ready(time.perf_counter() - began))
    is_resting = False
    while True:
        try:
            message = inbox.get(timeout=None if is_resting else REST_AFTER_S)
        except queue.Empty:
            workbench.rest()
            is_resting = True
            continue
        is_resting = False
        if isinstance(message, _Call):
            send(_answer(workbench, message))
            continue
        task_id = message.record.task_id
        control = controls.setdefault(task_id, Control())
        for event in events_of(lambda: workbench, message.record, control):
            send(_Happened(task_id, event))
        controls.pop(task_id, None)
        send(_RunOver(task_id))


def _hear(pipe: Connection, inbox: "queue.SimpleQueue[_Run | _Call]", controls: dict[str, Control]) -> None:
    """Read the pipe: wishes act at once, work is queued; the process ends with the pipe."""
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        if isinstance(message, _Wish):
            controls.setdefault(message.task_id, Control()).ask(message.action)
        else:
            inbox.put(message)


def _answer(workbench: Workbench, call: _Call) -> _Answer:
    try:
        return _Answer(call.number, workbench.call(call.tool, call.payload))
    except FocaleError as error:
        return _Answer(call.number, error=error)
    except Exception as error:  # told to the caller as a failure of the engine
        logger.exception("Tool %s failed", call.tool)
        return _Answer(call.number, error=EngineFailed(f"{type(error).__name__}: {error}"))


# -- the parent --------------------------------------------------------------------------------------------------


class ProcessEngine:
    """The engine in a child process; a dead child is replaced at the next use."""

    def __init__(self, make_workbench: MakeWorkbench) -> None:
        """Make an engine that is not started.

        Args:
            make_workbench: called in the child; must be picklable.
        """
        self._make_workbench = make_workbench
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._has_loop = threading.Event()
        self._runs: dict[str, asyncio.Queue[Event | WorkerDied | None]] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count(1)
        self._starting = asyncio.Lock()
        self._buried = asyncio.Event()
        self._reason = ""
        self.is_warm = False

    @property
    def process_id(self) -> int | None:
        """Process id of the child, None while there is none."""
        return self._process.pid if self._process and self._process.is_alive() else None

    def begin(self) -> None:
        """Spawn the child before there is a loop, so that it loads while the server is put together; see `start`."""
        self._spawn()

    async def start(self) -> None:
        """Spawn the child if none is alive."""
        async with self._starting:
            self._loop = asyncio.get_running_loop()
            self._has_loop.set()
            if self._process is not None:
                if self._process.is_alive():
                    return
                await self._buried.wait()  # else the runs of the next child would hear of this one's death
            await asyncio.to_thread(self._spawn)

    async def run(self, record: Record) -> AsyncIterator[Event]:
        """Run a task in the child; see `jobs.Engine.run`."""
        await self.start()
        inbox: asyncio.Queue[Event | WorkerDied | None] = asyncio.Queue()
        self._runs[record.task_id] = inbox
        try:
            self._send(_Run(record))
            while True:
                message = await inbox.get()
                if isinstance(message, WorkerDied):
                    raise message
                if message is None:
                    return
                yield message
        finally:
            self._runs.pop(record.task_id, None)

    def control(self, task_id: str, action: Action) -> None:
        """Pass a wish to the child; a dead child needs none."""
        with contextlib.suppress(WorkerDied):
            self._send(_Wish(task_id, action))

    async def call(self, tool: str, payload: Mapping[str, Any]) -> object:
        """Run a tool in the child, after the task in work.

        Raises:
            FocaleError: what the tool raised; EngineFailed for anything unforeseen, WorkerDied if the child ended.
        """
        await self.start()
        number = next(self._numbers)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[number] = future
        try:
            self._send(_Call(number, tool, payload))
            return await future
        finally:
            self._calls.pop(number, None)

    async def close(self) -> None:
        """End the child: ask by closing the pipe, then kill."""
        process, pipe = self._process, self._pipe
        self._process = self._pipe = None
        if pipe is not None:
            pipe.close()
        if process is not None:
            process.terminate()
            await asyncio.to_thread(process.join, CLOSE_TIMEOUT_S)
            if process.is_alive():
                process.kill()

    def _spawn(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=True)
        process = context.Process(
            target=serve_pipe, args=(theirs, self._make_workbench), name="focale-worker", daemon=True
        )
        process.start()
        theirs.close()
        self._process, self._pipe, self.is_warm, self._reason = process, ours, False, ""
        self._buried = asyncio.Event()
        threading.Thread(target=self._listen, args=(ours, process), name="focale-events", daemon=True).start()

    def _send(self, message: object) -> None:
        pipe = self._pipe
        if pipe is None:
            raise WorkerDied("The worker process is not running.")
        try:
            pipe.send(message)
        except (BrokenPipeError, OSError) as error:
            raise WorkerDied("The worker process ended.") from error

    def _listen(self, pipe: Connection, process: multiprocessing.process.BaseProcess) -> None:
        """Thread: pass what the child sends to the loop; tell of its death when the pipe ends."""
        self._has_loop.wait()
        while True:
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                break
            self._post(self._deliver, message)
        process.join(CLOSE_TIMEOUT_S)
        self._post(self._bury, process.exitcode)

    def _post(self, call: Callable[..., None], *args: object) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(call, *args)

    def _deliver(self, message: object) -> None:
        if isinstance(message, _Happened):
            inbox = self._runs.get(message.task_id)
            if inbox is not None:
                inbox.put_nowait(message.event)
        elif isinstance(message, _RunOver):
            inbox = self._runs.get(message.task_id)
            if inbox is not None:
                inbox.put_nowait(None)
        elif isinstance(message, _Answer):
            future = self._calls.get(message.number)
            if future is not None and not future.done():
                future.set_exception(message.error) if message.error else future.set_result(message.value)
        elif isinstance(message, ModelLoad):
            tell(message)
        elif isinstance(message, _CannotStart):
            self._reason = message.reason
        elif isinstance(message, _Ready):
            self.is_warm = True
            logger.info("The worker is ready after %.1f s", message.seconds)

    def _bury(self, exit_code: int | None) -> None:
        reason = self._reason or f"exit code {exit_code}"
        death = WorkerDied(f"the worker process ended unexpectedly ({reason})")
        for inbox in self._runs.values():
            inbox.put_nowait(death)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(death)
        self._buried.set()


class InlineEngine:
    """The same engine in a thread of this process: for tests, the command line and debugging."""

    def __init__(self, make_workbench: MakeWorkbench) -> None:
        """Make an engine that builds its workbench at the first use."""
        self._make_workbench = make_workbench
        self._workbench: Workbench | None = None
        self._controls: dict[str, Control] = {}
        self._one_at_a_time = asyncio.Lock()
        self.is_warm = True

    def begin(self) -> None:
        """Nothing to begin."""

    async def start(self) -> None:
        """Nothing to start."""

    async def run(self, record: Record) -> AsyncIterator[Event]:
        """Run a task in a thread; see `jobs.Engine.run`."""
        loop = asyncio.get_running_loop()
        control = self._controls.setdefault(record.task_id, Control())
        inbox: asyncio.Queue[Event | None] = asyncio.Queue()

        def work() -> None:
            for event in events_of(self._bench, record, control):
                loop.call_soon_threadsafe(inbox.put_nowait, event)
            loop.call_soon_threadsafe(inbox.put_nowait, None)

        async with self._one_at_a_time:
            working = asyncio.create_task(asyncio.to_thread(work))
            try:
                while (event := await inbox.get()) is not None:
                    yield event
                    if is_final(event):
                        break
            finally:
                control.ask("stop")
                await working
                self._controls.pop(record.task_id, None)

    def control(self, task_id: str, action: Action) -> None:
        """Pass a wish to the task."""
        self._controls.setdefault(task_id, Control()).ask(action)

    async def call(self, tool: str, payload: Mapping[str, Any]) -> object:
        """Run a tool in a thread, after the task in work."""
        async with self._one_at_a_time:
            return await asyncio.to_thread(lambda: self._bench().call(tool, payload))

    async def close(self) -> None:
        """Stop what runs."""
        for control in self._controls.values():
            control.ask("stop")

    def _bench(self) -> Workbench:
        if self._workbench is None:
            self._workbench = self._make_workbench()
        return self._workbench
