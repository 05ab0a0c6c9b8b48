"""The worker process: events come out, wishes go in, and its death costs one attempt."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any

import pytest

from modules.control import Control
from modules.errors import EngineFailed, Interrupted, NotFound, UnknownName, WorkerDied
from modules.events import Event, Failed, Finished, Noticed, Progress, Stopped
from modules.jobs import Engine
from modules.record import Record
from modules.worker import InlineEngine, ProcessEngine, Workbench


class ToyWorkbench:
    """Does what the prompt says."""

    def warm_up(self) -> None: ...

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
        if tool == "echo":
            return dict(payload)
        if tool == "missing":
            raise NotFound("There is no such thing.")
        raise ValueError(tool)


def toy() -> Workbench:
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


async def events(engine: Engine, wish: str) -> list[Event]:
    return [event async for event in engine.run(record(wish))]


async def test_events_arrive_in_order(engine: Engine) -> None:
    first, last = await events(engine, "go")
    assert isinstance(first, Noticed)
    assert isinstance(last, Finished)


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
    waiting = asyncio.create_task(events(process, "wait"))
    calling = asyncio.create_task(process.call("echo", {}))
    while process.process_id is None:
        await asyncio.sleep(0.01)
    os.kill(process.process_id, signal.SIGKILL)
    with pytest.raises(WorkerDied):
        await waiting
    with pytest.raises(WorkerDied):
        await calling


async def test_the_child_ends_with_its_engine(process: ProcessEngine) -> None:
    pid = process.process_id
    assert pid is not None
    await process.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
