"""Rounds of load and SIGKILL against one output folder, and the check of what must hold afterwards."""

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from modules.choices import TaskStatus
from modules.history import History
from tests.crash.server import picture_of

ROOT = Path(__file__).resolve().parent.parent.parent
CLIENTS = 3
READY_TIMEOUT_S = 60.0
STUCK_S = 60.0


@dataclass
class Tally:
    """What all rounds together saw.

    lost: acknowledged tasks without a record. unfinished: records without a final state after the last restart.
    doubled: task ids with more than one record. faults: sentences about files and records that disagree.
    """

    rounds: int = 0
    server_kills: int = 0
    worker_kills: int = 0
    acknowledged: set[str] = field(default_factory=set)
    statuses: dict[str, int] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """True when nothing was lost and all agrees."""
        return not (self.lost or self.unfinished or self.doubled or self.faults)


class ServerProcess:
    """A server on an output folder, to be killed."""

    def __init__(self, outputs: Path) -> None:
        self.port = free_port()
        self._log = open(outputs.parent / "server.log", "ab")  # noqa: SIM115 - closed by end()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.server", "--port", str(self.port), "--output-path", str(outputs)],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip
        self._wait_until_ready()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """POST JSON; raises OSError when the server is gone."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            return dict(json.load(answer))

    def waiting(self) -> int:
        """How many tasks wait or run."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        counts = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return int(float(counts["focale_queue_length"]) + float(counts["focale_tasks_running"]))

    def kill_worker(self) -> bool:
        """SIGKILL the worker; False when there is none at this moment."""
        for child in self._children():
            if "spawn_main" in " ".join(child.cmdline()):
                child.kill()
                return True
        return False

    def kill(self) -> None:
        """SIGKILL the server; its worker ends by itself when the pipe closes."""
        children = self._children()
        self._process.send_signal(signal.SIGKILL)
        self.end()
        psutil.wait_procs(children, timeout=10)

    def end(self) -> None:
        """Wait for the end and close what was opened."""
        self._process.wait(timeout=30)
        if self._process.stdout:
            self._process.stdout.close()
        self._log.close()

    def terminate(self) -> None:
        """End it the ordinary way."""
        self._process.terminate()
        self.end()

    def _children(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self._process.pid).children(recursive=True)
        return []

    def _wait_until_ready(self) -> None:
        assert self._process.stdout is not None
        timer = threading.Timer(READY_TIMEOUT_S, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line.startswith("ready"):
            raise RuntimeError("The server did not start; its log is server.log.")


def free_port() -> int:
    """A port that nobody listens on, with the next one free as well."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port


def run_rounds(outputs: Path, rounds: int, seed: int = 0) -> Tally:
    """Load, kill and restart `rounds` times, let the last server finish, then check everything."""
    rng = random.Random(seed)
    tally = Tally()
    for number in range(rounds):
        _one_round(outputs, rng, tally, seed_base=number * 10_000)
        tally.rounds += 1
    _drain(outputs)
    _check(outputs, tally)
    return tally


def _one_round(outputs: Path, rng: random.Random, tally: Tally, *, seed_base: int) -> None:
    server = ServerProcess(outputs)
    stopping = threading.Event()
    clients = [
        threading.Thread(target=_client, args=(server, stopping, tally, seed_base + 1000 * index, rng.randrange(2**32)))
        for index in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    time.sleep(rng.uniform(0.05, 0.6))
    if rng.random() < 0.5 and server.kill_worker():
        tally.worker_kills += 1
        time.sleep(rng.uniform(0.0, 0.5))
    server.kill()
    tally.server_kills += 1
    stopping.set()
    for client in clients:
        client.join()


def _client(server: ServerProcess, stopping: threading.Event, tally: Tally, seed: int, dice: int) -> None:
    """Submit tasks, now and then stop or skip one, until the server is gone."""
    rng = random.Random(dice)
    while not stopping.is_set():
        seed += 10
        body = {
            "prompt": f"task {seed}", "image_seed": seed, "image_number": rng.randint(1, 3), "async_process": True,
            "style_selections": [], "priority": rng.choice(["interactive", "batch"]),
        }  # fmt: skip
        try:
            tally.acknowledged.add(str(server.post("/v1/engine/generate/", body)["task_id"]))
            if rng.random() < 0.2:
                server.post(f"/v1/engine/control/?action={rng.choice(['stop', 'skip'])}", {})
        except (OSError, ValueError, http.client.HTTPException):  # an answer may be cut off in the middle
            return
        time.sleep(rng.uniform(0, 0.15))


def _drain(outputs: Path) -> None:
    """Start once more and wait until nothing waits or runs, or nothing moves any more."""
    server = ServerProcess(outputs)
    left, moved_at = server.waiting(), time.monotonic()
    while left and time.monotonic() < moved_at + STUCK_S:
        time.sleep(0.2)
        now_left = server.waiting()
        if now_left != left:
            left, moved_at = now_left, time.monotonic()
    server.terminate()


def _check(outputs: Path, tally: Tally) -> None:
    """Every acknowledged task has exactly one record in a final state, whose files are there and whole."""
    with History(outputs, read_only=True) as history:
        records = history.page(page_size=None, statuses=tuple(TaskStatus))
    ids = [record.task_id for record in records]
    tally.lost = sorted(tally.acknowledged.difference(ids))
    tally.doubled = sorted({task_id for task_id in ids if ids.count(task_id) > 1}) if len(set(ids)) < len(ids) else []
    claimed: set[Path] = set()
    for record in records:
        tally.statuses[record.task_status.value] = tally.statuses.get(record.task_status.value, 0) + 1
        if not record.task_status.is_final:
            tally.unfinished.append(record.task_id)
        wanted = int(record.req_params["image_number"])
        if record.task_status is TaskStatus.FINISHED and len(record.settled) != wanted:
            tally.faults.append(f"{record.task_id} is finished with {len(record.settled)} of {wanted} images settled")
        for path, seed in zip(record.result, record.seeds, strict=True):
            claimed.add(outputs / path)
            tally.faults += _faults_of_file(outputs / path, seed, record.task_id)
    partial = [path.name for path in outputs.rglob("*.part")]
    tally.faults += [f"{name} was left half written" for name in partial]


def _faults_of_file(path: Path, seed: int, task_id: str) -> list[str]:
    try:
        with Image.open(path) as image:
            image.load()
            right = image.getpixel((0, 0)) == picture_of(seed).getpixel((0, 0))
    except OSError as error:
        return [f"{task_id}: {path.name}: {error}"]
    return [] if right else [f"{task_id}: {path.name} is not the picture of seed {seed}"]


def leave_no_process() -> None:
    """End what a failed round may have left."""
    for child in psutil.Process(os.getpid()).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
