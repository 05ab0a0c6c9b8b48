"""Many followers of one task: what is told once is made once, and reaches everybody soon."""

import asyncio
import statistics
import time
from collections import Counter
from urllib.parse import urlsplit

import pytest

from extensions.rest_api import live, wire
from extensions.rest_api.once import Once
from modules.choices import Source
from modules.events import Event, Progress, Queued
from modules.jobs import Job
from modules.record import Record
from modules.request import GenerationRequest
from modules.signing import UrlSigner
from tests.rest.conftest import Running
from tests.rest.live import Live, live_server

FOLLOWERS = 200
STEPS = 8
BOUND_MS = 100


class Follower(asyncio.Protocol):
    """A client that only notes when each event came; parsing would be its own cost, not the server's.

    arrived_s: step number → moment of its `progress` event.
    """

    def __init__(self, path: str, host: str) -> None:
        self._request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
        self._text = b""
        self.arrived_s: dict[int, float] = {}
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now_s = time.perf_counter()
        self._text += data
        while b"\r\n\r\n\r\n" in self._text:  # end of an event, end of its chunk
            event, _, self._text = self._text.partition(b"\r\n\r\n\r\n")
            if b'"step":' in event:
                self.arrived_s.setdefault(int(event.split(b'"step":', 1)[1].split(b",", 1)[0]), now_s)
            if b"event: finished" in event and not self.ended.done():
                self.ended.set_result(None)


async def follow(server: Live, task_id: str, count: int) -> list[Follower]:
    """That many clients, each on its own connection and served."""
    where, loop = urlsplit(server.api_url), asyncio.get_running_loop()
    path = f"/tasks/{task_id}/events"
    made = [Follower(path, where.netloc) for _ in range(count)]
    for follower in made:
        await loop.create_connection(lambda follower=follower: follower, where.hostname, where.port)
    return made


def slowness(cpu_s: float = 0.02) -> float:
    """How many times longer than on an idle machine plain computing takes at this moment."""
    began_s, until_s = time.perf_counter(), time.process_time() + cpu_s
    while time.process_time() < until_s:
        pass
    return max(1.0, (time.perf_counter() - began_s) / cpu_s)


@pytest.mark.slow
async def test_an_event_reaches_two_hundred_followers_within_100_ms(tmp_path):
    """Each round has the bound of an idle machine, times what computing took just before and after it; one suffices."""
    told_s: dict[int, float] = {}
    slow: list[float] = []

    def note(_job: Job, event: Event) -> None:
        if isinstance(event, Progress):
            told_s[event.step] = time.perf_counter()

    async with live_server(tmp_path) as server, asyncio.timeout(50):
        server.engine.steps, server.engine.size = STEPS, (1152, 896)
        server.engine.hold()
        server.services.jobs.on_event(note)
        job = await server.services.handlers.submit(GenerationRequest(image_number=1), source=Source.API)
        await server.engine.held.wait()
        followers = await follow(server, job.task_id, FOLLOWERS)
        while not all(0 in follower.arrived_s for follower in followers):
            await asyncio.sleep(0.01)
        for step in range(1, STEPS):
            before = slowness()
            server.engine.hold(step + 1)
            server.engine._wake.set()
            while not all(step in follower.arrived_s for follower in followers):
                await asyncio.sleep(0.002)
            slow.append((before + slowness()) / 2)
        server.engine.release()
        await asyncio.gather(*(follower.ended for follower in followers))
    delays_ms = [
        sorted((follower.arrived_s[step] - told_s[step]) * 1000 for follower in followers) for step in range(1, STEPS)
    ]
    rounds = list(zip(delays_ms, slow, strict=True))
    shown = [f"{statistics.median(delays):.0f}/{delays[-1]:.0f} (x{times:.1f})" for delays, times in rounds]
    print(f"\nmedian/last of {FOLLOWERS} followers after each event, ms (slowness of the machine):", *shown)
    assert min(delays[-1] / times for delays, times in rounds) <= BOUND_MS


async def test_an_event_is_put_into_words_once_for_all_followers(server: Running, monkeypatch):
    """Counted, not timed: fifty followers cost as many conversions as one."""
    frames, previews = Counter[str](), Counter[bytes]()
    make_frame, make_png = live._frame, wire._png_of

    def counted_frame(name: str, data: dict, event_id: str | None) -> bytes:
        frames[str(event_id)] += 1
        return make_frame(name, data, event_id)

    def counted_png(jpeg: bytes) -> str:
        previews[jpeg] += 1
        return make_png(jpeg)

    monkeypatch.setattr(live, "_frame", counted_frame)
    monkeypatch.setattr(wire, "_png_of", counted_png)
    server.engine.hold(at_step=2)
    task_id = await server.accepted({"image_number": 2})
    await server.engine.held.wait()
    followers = [asyncio.create_task(server.client.get(f"/tasks/{task_id}/events")) for _ in range(50)]
    while len(server.application.front._in_work) < 50 or not previews:
        await asyncio.sleep(0)
    server.engine.release()
    texts = {reply.text for reply in await asyncio.gather(*followers)}
    assert all(text.count("event: image") == 2 and "event: finished" in text for text in texts)
    assert frames
    assert set(frames.values()) == {1}
    assert previews
    assert set(previews.values()) == {1}


async def test_a_value_is_made_once_and_a_failure_is_not_kept():
    once: Once[int] = Once(kept=2)
    made: list[str] = []
    gate = asyncio.Event()

    async def slow() -> int:
        made.append("slow")
        await gate.wait()
        return len(made)

    async def broken() -> int:
        made.append("broken")
        raise ValueError

    waiting = [asyncio.create_task(once.get("a", slow)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    gate.set()
    assert await asyncio.gather(*waiting[1:]) == [1, 1]
    for _ in range(2):
        with pytest.raises(ValueError):
            await once.get("b", broken)
    assert made == ["slow", "broken", "broken"]
    for key in "cd":
        await once.get(key, slow)
    await once.get("a", slow)
    assert made.count("slow") == 4, "the oldest value made room"


async def test_a_reader_that_stops_reading_gets_the_newest_preview_and_every_result(tmp_path, monkeypatch):
    """Its socket fills up after some previews; what it reads later is not all that it missed."""
    steps = 400
    monkeypatch.setattr(wire, "_png_of", lambda _jpeg: "x" * 200_000)
    async with live_server(tmp_path) as server, asyncio.timeout(50):
        server.engine.steps = steps
        server.engine.hold()
        job = await server.services.handlers.submit(GenerationRequest(image_number=2), source=Source.API)
        await server.engine.held.wait()
        where = urlsplit(server.api_url)
        reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=1000)
        writer.write(f"GET /tasks/{job.task_id}/events HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n".encode())
        assert b"200" in await reader.readline()
        server.engine.release()
        async for _event in job.log.follow():
            pass
        text = b""
        while b"event: finished" not in text:
            text += await reader.read(2**20)
        writer.close()
        await writer.wait_closed()
    assert text.count(b"event: image") == 2
    assert 1 <= text.count(b"event: progress") < steps


class CountdownMeter:
    """An estimate that shrinks each time it is asked for."""

    def __init__(self) -> None:
        self.left_s = 100.0

    def seconds_left(self, _task_id: str) -> float:
        self.left_s -= 1
        return self.left_s


async def test_a_place_that_is_told_later_comes_with_what_is_left_by_then():
    now_s = 10.2
    events = live.TaskEvents(CountdownMeter(), wire.Previews(), clock_s=lambda: now_s)
    caller = wire.Wire("http://x", UrlSigner(b"", enabled=False))

    async def told() -> bytes:
        return await events.frame(1, Queued(3), Record(task_id="a"), caller)

    first, at_once = await told(), await told()
    now_s = 11.4
    later = await told()
    assert first == at_once
    assert b'"eta_seconds":99.0' in first
    assert b'"eta_seconds":98.0' in later
