"""The real engine, killed in the middle of a picture: it goes on with the same pixels and repeats no step."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.crash.rounds import ROOT, free_port

pytestmark = [pytest.mark.crash, pytest.mark.slow, pytest.mark.engine]

BODY = {
    "prompt": "a red apple",
    "image_seed": 11,
    "style_selections": [],
    "sampler_name": "dpmpp_2m",
    "async_process": True,
}
STEPS = 30
KILL_AT = 20
TIMEOUT_S = 240.0


class RealServer:
    """The program itself, without the page."""

    def __init__(self, outputs: Path) -> None:
        self.port = free_port()
        self._log = open(outputs.parent / "server.log", "ab")  # noqa: SIM115 - closed by end()
        command = [sys.executable, "webui.py", "--nowebui", "--port", str(self.port), "--output-path", str(outputs)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=self._log, stderr=self._log)

    def call(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET, or POST with a body; waits for the server to listen."""
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                    return json.load(answer)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def messages(self, task_id: str) -> Iterator[str]:
        """Step texts of a task as they come."""
        url = f"http://127.0.0.1:{self.port}/tasks/{task_id}/events"
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as stream:
            for line in stream:
                yield line.decode()

    def worker(self) -> psutil.Process:
        """The worker process."""
        children = psutil.Process(self._process.pid).children(recursive=True)
        return next(child for child in children if "spawn_main" in " ".join(child.cmdline()))

    def kill(self) -> None:
        """SIGKILL, worker included."""
        children = psutil.Process(self._process.pid).children(recursive=True)
        self._process.kill()
        psutil.wait_procs(children, timeout=20)
        self.end()

    def end(self) -> None:
        """End it, one way or the other."""
        self._process.terminate()
        self._process.wait(timeout=60)
        self._log.close()


def ended(server: RealServer, task_id: str) -> dict[str, Any]:
    """The record of a task, when it has ended."""
    for _message in server.messages(task_id):
        pass
    record: dict[str, Any] = server.call(f"/tasks/{task_id}")
    return record


def pixels(outputs: Path, record: dict[str, Any]) -> np.ndarray:
    """The picture of a record."""
    path = record["result"][0].partition("/outputs/")[2].partition("?")[0]
    with Image.open(outputs / path) as image:
        return np.asarray(image.convert("RGB"))


def wait_for_step(server: RealServer, task_id: str, step: int) -> None:
    """Return when the task has reached a step."""
    for message in server.messages(task_id):
        found = re.search(r"Sampling step (\d+)/", message)
        if found and int(found[1]) >= step:
            return
    raise AssertionError(f"the task ended before step {step}")


@pytest.mark.parametrize("victim", ["server", "worker"])
def test_a_picture_killed_at_step_20_goes_on_with_the_same_pixels(tmp_path: Path, victim: str) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    server = RealServer(outputs)
    try:
        undisturbed = ended(server, server.call("/v1/engine/generate/", BODY)["task_id"])
        task_id = server.call("/v1/engine/generate/", BODY)["task_id"]
        wait_for_step(server, task_id, KILL_AT)
        if victim == "server":
            server.kill()
            server = RealServer(outputs)
            server.call("/tasks?query=pending")
        else:
            server.worker().kill()
        record = ended(server, task_id)
    finally:
        server.end()
    assert (undisturbed["task_status"], record["task_status"]) == ("finished", "finished"), record
    notes = " ".join(record["notes"])
    replayed = re.search(r"Went on after (\d+) model evaluations", notes)
    assert replayed is not None, notes
    assert KILL_AT <= int(replayed[1]) < STEPS + 1
    assert np.array_equal(pixels(outputs, record), pixels(outputs, undisturbed))
