"""Missing model files over REST: fetched as part of the task, told in the stream, refused when switched off."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from modules.checks import RequestChecks
from tests.model_server import ModelServer, model_bytes, model_server
from tests.rest.conftest import ROOT, Running, Serve

ANIME = "animaPencilXL_v500.safetensors"
ANIME_PATH = f"mashb1t/fav_models/resolve/main/fav/{ANIME}"


@pytest.fixture
def models() -> Iterator[ModelServer]:
    """The mirror that stands in for the hub."""
    with model_server() as running:
        yield running


def checked(server: Running) -> Running:
    """The server with the real check of requests in place of the fake one."""
    services = server.services
    services.handlers._check = RequestChecks(services.resources.plan_resources, services.provision)
    return server


def checkpoint(server: Running) -> Path:
    return server.services.settings.paths.checkpoints[0] / ANIME


async def test_a_preset_fetches_its_files_before_the_task_starts(serve: Serve, models: ModelServer) -> None:
    models.add(ANIME_PATH, model_bytes())
    server = checked(await serve("--hf-mirror", models.url))
    reply = await server.generate({"preset": "anime", "prompt": "a fox"})
    assert reply.status_code == 200, reply.text
    record = reply.json()
    assert record["task_status"] == "finished"
    assert record["req_params"]["base_model_name"] == ANIME
    assert any(note.startswith(f"Downloaded {ANIME}") for note in record["notes"])
    assert checkpoint(server).read_bytes() == model_bytes()
    assert models.ranges_asked == [""]
    await server.generate({"preset": "anime", "prompt": "a fox"})
    assert models.ranges_asked == [""]


async def test_the_stream_tells_the_download_and_never_falls(serve: Serve, models: ModelServer) -> None:
    models.add(ANIME_PATH, model_bytes(3_000_000), pause=lambda _sent: time.sleep(0.004))
    server = checked(await serve("--hf-mirror", models.url))
    reply = await server.generate({"preset": "anime", "prompt": "a fox", "stream_output": True})
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
    messages = [json.loads(line) for line in lines]
    percents = [message["progress"] for message in messages]
    assert percents == sorted(percents)
    downloading = [message for message in messages if message["message"].startswith(f"Downloading {ANIME}")]
    assert len(downloading) >= 3
    assert downloading[-1]["progress"] <= 50
    assert messages[-1]["message"] == "Finished"
    assert len(messages[-1]["images"]) == 1


@pytest.mark.parametrize("flag", ["--disable-preset-download", "--offline"])
async def test_a_switched_off_download_is_422_with_files_and_addresses(
    serve: Serve, models: ModelServer, flag: str
) -> None:
    server = checked(await serve("--hf-mirror", models.url, flag))
    reply = await server.generate({"preset": "anime", "prompt": "a fox"})
    assert reply.status_code == 422
    detail = reply.json()["detail"][0]
    assert detail["loc"] == ["body", "preset"]
    assert f"{models.url}/{ANIME_PATH}" in detail["msg"]
    assert flag in detail["msg"]
    assert models.asked == []


async def test_a_request_without_preset_fetches_nothing(serve: Serve, models: ModelServer) -> None:
    server = await serve("--hf-mirror", models.url)
    assert (await server.generate({"prompt": "a fox"})).status_code == 200
    assert models.asked == []


async def test_a_failed_download_ends_the_task_with_the_address(serve: Serve, models: ModelServer) -> None:
    server = checked(await serve("--hf-mirror", models.url))
    reply = await server.generate({"preset": "anime", "prompt": "a fox"})
    assert reply.status_code == 500
    record = reply.json()
    assert record["task_status"] == "error"
    assert f"{models.url}/{ANIME_PATH}" in record["error"]
    assert server.engine.runs == []


async def test_other_tasks_run_while_one_downloads_and_stop_ends_it(serve: Serve, models: ModelServer) -> None:
    released = threading.Event()
    models.add(ANIME_PATH, model_bytes(), pause=lambda sent: sent > 250_000 and released.wait(20))
    server = checked(await serve("--hf-mirror", models.url))
    slow = await server.accepted({"preset": "anime", "prompt": "slow"})
    async for _number, event in server.services.jobs.get(slow).log.follow():
        if "Downloading" in getattr(event, "message", ""):
            break
    checkpoint(server).with_name("mine.safetensors").write_bytes(model_bytes(1000))
    quick = await server.generate({"prompt": "quick", "base_model_name": "mine.safetensors", "loras": []})
    assert quick.status_code == 200, quick.text
    waiting = (await server.client.get(f"/tasks/{slow}")).json()
    assert waiting["task_status"] == "pending"
    reply = await server.client.post("/v1/engine/control/", params={"action": "stop", "task_id": slow})
    assert reply.status_code == 200
    assert (await server.ended(slow))["task_status"] == "stop"
    assert not checkpoint(server).exists()
    released.set()


async def test_styles_follow_their_files(serve: Serve, tmp_path: Path) -> None:
    (tmp_path / "presets" / "styles").mkdir(parents=True)
    server = await serve()
    before = (await server.client.get("/v1/engines/styles")).json()
    (tmp_path / "presets" / "styles" / "mine.json").write_text('[{"name": "Quite New", "prompt": "{prompt}"}]')
    after = (await server.client.get("/v1/engines/styles")).json()
    assert set(after) - set(before) == {"Quite New"}


@pytest.mark.crash
def test_a_killed_server_goes_on_with_the_download_after_its_restart(models: ModelServer, tmp_path: Path) -> None:
    is_slow = [True]

    def pause(sent: int) -> None:
        if is_slow[0] and sent > 70_000_000:
            time.sleep(30)

    content = model_bytes(80_000_000)
    models.add(ANIME_PATH, content, pause=pause, chunk=1 << 20)
    with started_server(models, tmp_path) as (url, child):
        body = {"preset": "anime", "prompt": "a fox", "async_process": True}
        task_id = httpx.post(f"{url}/v1/engine/generate/", json=body, timeout=20).json()["task_id"]
        part = next(wait_for(lambda: list(tmp_path.rglob(f"{ANIME}.part")) or None))[0]
        next(wait_for(lambda: part.stat().st_size > 68_000_000 or None))
        child.send_signal(signal.SIGKILL)
        child.wait(10)
    is_slow[0] = False
    with started_server(models, tmp_path) as (url, _child):
        done = next(wait_for(lambda: finished(url, task_id)))
    assert done["task_status"] == "finished"
    assert part.with_name(ANIME).read_bytes() == content
    assert models.ranges_asked[-1].startswith("bytes=6")
    assert not part.exists()


def finished(url: str, task_id: str) -> dict[str, object] | None:
    """The record of a task that has ended."""
    record = httpx.get(f"{url}/tasks/{task_id}", timeout=20).json()
    return record if record["task_status"] not in ("pending", "running") else None


def wait_for(look) -> Iterator[object]:
    """What `look` gives as soon as it gives something."""
    ends_s = time.monotonic() + 60
    while (found := look()) is None:
        assert time.monotonic() < ends_s, "it did not happen"
        time.sleep(0.05)
    yield found


class started_server:
    """A server with the fake engine in a process of its own, on the folder of the test."""

    def __init__(self, models: ModelServer, folder: Path) -> None:
        self._command = [
            sys.executable, "-m", "tests.fake_server", "--folder", str(folder),
            "--port", "0", "--hf-mirror", models.url,
        ]  # fmt: skip

    def __enter__(self) -> tuple[str, subprocess.Popen[str]]:
        self._child = subprocess.Popen(
            self._command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ | {"API_PORT": "0"}
        )
        line = self._child.stdout.readline()
        assert line.startswith("ready "), line
        return line.split()[1], self._child

    def __exit__(self, *_error: object) -> None:
        self._child.kill()
        self._child.wait(10)
        self._child.stdout.close()
