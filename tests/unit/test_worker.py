"""The worker process: events come out, wishes go in, and its death costs one attempt."""

import asyncio
import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import pytest

from modules import worker
from modules.control import Control
from modules.errors import EngineFailed, Interrupted, NotFound, UnknownName, WorkerDied
from modules.events import Event, Failed, Finished, Noticed, Progress, Stopped
from modules.jobs import Engine
from modules.loads import ModelLoad, listen, loading
from modules.record import Record
from modules.worker import InlineEngine, ProcessEngine, Workbench


class Knot:
    """Something that only the collector of garbage can free."""

    def __init__(self) -> None:
        self.itself = self


class ToyWorkbench:
    """Does what the prompt says."""

    rests = 0

    def warm_up(self) -> None:
        self.model = Knot()

    def rest(self) -> None:
        self.rests += 1

    def run(self, record: Record, control: Control) -> Iterator[Event]:
        wish = record.req_params["prompt"]
        yield Noticed(f"pid {os.getpid()}")
        if wish == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if wish == "fail":
            raise ValueError("boom")
        if wish == "unknown":
            raise UnknownName("base_model_name", "x", ["y"], what="checkpoint")
        if wish == "wait":
            step = 0
            while True:
                step += 1
                try:
                    control.check()
                except Interrupted:
                    yield Stopped()
                    return
                if step % 1000 == 0:
                    yield Progress(1, f"Sampling step {step}/0, image 1/1 ...")
        yield Finished()

    def call(self, tool: str, payload: Mapping[str, Any]) -> Any:
        if tool == "load":
            with loading("checkpoint", payload["name"]):
                return None
        if tool == "echo":
            return dict(payload)
        if tool == "rests":
            return self.rests
        if tool == "forget":
            model = weakref.ref(self.model)
            del self.model
            gc.collect()
            return model() is None
        if tool == "missing":
            raise NotFound("There is no such thing.")
        raise ValueError(tool)


def toy() -> Workbench:
    return ToyWorkbench()


def restless_toy() -> Workbench:
    worker.REST_AFTER_S = 0.1
    return ToyWorkbench()


MakeEngine = Callable[[], Engine]


@pytest.fixture(params=[ProcessEngine, InlineEngine], ids=["process", "inline"])
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[ProcessEngine | InlineEngine]:
    engine = request.param(toy)
    await engine.start()
    yield engine
    await engine.close()


@pytest.fixture
async def process() -> AsyncIterator[ProcessEngine]:
    engine = ProcessEngine(toy)
    await engine.start()
    yield engine
    await engine.close()


def record(wish: str) -> Record:
    return Record(task_id=wish.ljust(32, "0"), req_params={"prompt": wish})


async def to_the_end(running: AsyncIterator[Event]) -> None:
    async for _event in running:
        pass


async def events(engine: Engine, wish: str) -> list[Event]:
    return [event async for event in engine.run(record(wish))]


async def test_events_arrive_in_order(engine: Engine) -> None:
    first, last = await events(engine, "go")
    assert isinstance(first, Noticed)
    assert isinstance(last, Finished)


async def test_what_a_child_loads_at_first_can_be_given_up(process: ProcessEngine) -> None:
    assert await process.call("forget", {}) is True


async def test_a_child_that_began_before_there_was_a_loop_is_the_one_that_works() -> None:
    engine = ProcessEngine(toy)
    engine.begin()
    began = engine.process_id
    await engine.start()
    assert isinstance((await events(engine, "go"))[-1], Finished)
    assert engine.process_id == began
    await engine.close()


async def test_a_child_that_died_before_there_was_a_loop_is_replaced() -> None:
    engine = ProcessEngine(toy)
    engine.begin()
    began = engine.process_id
    assert began is not None
    os.kill(began, signal.SIGKILL)
    os.waitid(os.P_PID, began, os.WEXITED | os.WNOWAIT)
    await engine.start()
    assert isinstance((await events(engine, "go"))[-1], Finished)
    assert engine.process_id != began
    await engine.close()


async def test_a_failure_becomes_the_last_event(engine: Engine) -> None:
    last = (await events(engine, "fail"))[-1]
    assert last == Failed("ValueError: boom", "ValueError")


async def test_an_error_of_ours_keeps_its_sentence(engine: Engine) -> None:
    last = (await events(engine, "unknown"))[-1]
    assert isinstance(last, Failed)
    assert last.error.startswith("base_model_name: 'x' is not a known checkpoint")


async def test_stop_reaches_a_running_task(engine: Engine) -> None:
    seen: list[Event] = []
    async for event in engine.run(record("wait")):
        seen.append(event)
        engine.control(record("wait").task_id, "stop")
    assert isinstance(seen[-1], Stopped)


async def test_stop_before_the_task_is_taken_is_not_lost(engine: Engine) -> None:
    engine.control(record("wait").task_id, "stop")
    assert isinstance((await events(engine, "wait"))[-1], Stopped)


async def test_tools_answer_and_their_errors_come_back(engine: ProcessEngine | InlineEngine) -> None:
    assert await engine.call("echo", {"a": 1}) == {"a": 1}
    with pytest.raises(NotFound, match="no such thing"):
        await engine.call("missing", {})


async def test_an_unforeseen_tool_failure_is_an_engine_failure(process: ProcessEngine) -> None:
    with pytest.raises(EngineFailed, match="ValueError"):
        await process.call("other", {})


async def test_the_work_is_done_in_another_process(process: ProcessEngine) -> None:
    first = (await events(process, "go"))[0]
    assert first == Noticed(f"pid {process.process_id}")
    assert process.process_id != os.getpid()


@pytest.mark.crash
async def test_a_killed_worker_is_told_and_replaced(process: ProcessEngine) -> None:
    before = process.process_id
    with pytest.raises(WorkerDied, match="-9"):
        await events(process, "die")
    assert isinstance((await events(process, "go"))[-1], Finished)
    assert process.process_id != before


@pytest.mark.crash
async def test_a_tool_call_whose_worker_dies_fails(process: ProcessEngine) -> None:
    running = process.run(record("wait"))
    assert isinstance(await anext(running), Noticed)
    calling = asyncio.create_task(process.call("echo", {}))
    await asyncio.sleep(0)  # the call is in the pipe, behind a task that does not end by itself
    assert process.process_id is not None
    os.kill(process.process_id, signal.SIGKILL)
    with pytest.raises(WorkerDied):
        await calling
    with pytest.raises(WorkerDied):
        await to_the_end(running)


@pytest.mark.crash
async def test_a_death_is_told_to_those_it_concerns_only(process: ProcessEngine, monkeypatch) -> None:
    """What the replacement is asked is never answered with the death of the one before, however late that is told."""
    told = threading.Event()
    bury = process._bury

    def late(exit_code: int | None) -> None:
        told.set()
        bury(exit_code)

    post = process._post

    def slow(call: Callable[..., None], *args: object) -> None:
        if call is late:
            time.sleep(0.5)
        post(call, *args)

    monkeypatch.setattr(process, "_bury", late)
    monkeypatch.setattr(process, "_post", slow)
    assert process.process_id is not None
    os.kill(process.process_id, signal.SIGKILL)
    while process.process_id is not None:
        await asyncio.sleep(0.01)
    assert not told.is_set()
    assert isinstance((await events(process, "go"))[-1], Finished)
    assert told.is_set()


async def test_the_child_ends_with_its_engine(process: ProcessEngine) -> None:
    pid = process.process_id
    assert pid is not None
    await process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_the_workbench_rests_once_when_nothing_is_asked_for_a_while() -> None:
    engine = ProcessEngine(restless_toy)
    assert await engine.call("rests", {}) in (0, 1)  # once after the warming up, on a slow machine
    before = await engine.call("rests", {})
    await asyncio.sleep(1)
    assert await engine.call("rests", {}) == before + 1
    await engine.close()


async def test_loads_of_models_are_told_in_the_web_process(engine: ProcessEngine | InlineEngine) -> None:
    told: list[ModelLoad] = []
    end = listen(told.append)
    await engine.call("load", {"name": "a.safetensors"})
    end()
    await engine.call("load", {"name": "b.safetensors"})
    assert [(load.kind, load.name) for load in told] == [("checkpoint", "a.safetensors")]
    assert told[0].seconds >= 0


def test_a_load_that_fails_is_not_told() -> None:
    told: list[ModelLoad] = []
    end = listen(told.append)
    with pytest.raises(OSError, match="gone"), loading("vae", "x"):
        raise OSError("gone")
    end()
    assert told == []
