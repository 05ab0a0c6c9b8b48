"""`python -m benchmarks.sync_call`: wall time of a synchronous REST call beside its model time."""

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import requests

from modules import serving
from modules.assembly import build_services
from modules.events import Finished, Progress
from modules.extensions import Services, load_extensions
from modules.settings import Settings

BAR = 1.10
FIRST_EVENT_BAR_MS = 50


def call(url: str, seed: int) -> tuple[float, str]:
    """One synchronous call of the embedded model at Speed; seconds and task id."""
    body = {"prompt": "a red apple", "image_seed": seed, "style_selections": []}
    began = time.perf_counter()
    record = requests.post(f"{url}/v1/engine/generate/", json=body, timeout=600).json()
    assert record["task_status"] == "finished", record
    return time.perf_counter() - began, record["task_id"]


async def first_progress_ms(services: Services, url: str) -> float:
    """Milliseconds from a request to its first progress event, on a warm worker."""
    seen: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    began = time.perf_counter()

    def hear(_job: object, event: object) -> None:
        if isinstance(event, Progress) and not seen.done():
            seen.set_result((time.perf_counter() - began) * 1000)

    services.jobs.on_event(hear)
    calling = asyncio.create_task(asyncio.to_thread(call, url, 99))
    latency = await seen
    await calling
    return latency


async def measure(rounds: int, outputs: Path) -> None:
    """Serve, call and print."""
    loaded = load_extensions()
    flags = ["--nowebui", "--port", "0", "--output-path", str(outputs)]
    settings, listeners = serving.bind(Settings.load(flags, extra=loaded.argument_adders()))
    services = build_services(settings)
    application = serving.assemble(services, loaded.extensions, api_ports=listeners.api_ports)
    ready = asyncio.Event()
    server = serving.Server(application, on_ready=ready.set)
    serving_task = asyncio.create_task(server.serve(sockets=listeners.sockets))
    await ready.wait()
    url = f"http://127.0.0.1:{settings.webui_port}"
    began = time.perf_counter()
    await asyncio.to_thread(call, url, 0)
    print(f"first call after start, worker start included: {time.perf_counter() - began:.2f} s")
    ratios, walls = [], []
    for seed in range(1, rounds + 1):
        wall, task_id = await asyncio.to_thread(call, url, seed)
        job = services.jobs.get(task_id)
        assert job is not None
        finished = [event async for _, event in job.log.follow()][-1]
        assert isinstance(finished, Finished)
        walls.append(wall)
        ratios.append(wall / finished.model_seconds)
    print(f"one picture, 30 steps: median {statistics.median(walls):.2f} s, best {min(walls):.2f} s")
    print(f"wall ÷ inside the networks: median {statistics.median(ratios):.3f} (bar {BAR})")
    latency = await first_progress_ms(services, url)
    print(f"first progress event after {latency:.0f} ms (bar {FIRST_EVENT_BAR_MS})")
    server.should_exit = True
    await serving_task
    services.history.close()


def main() -> None:
    """Measure in a temporary output folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="focale-bench-") as folder:
        asyncio.run(measure(arguments.rounds, Path(folder)))


if __name__ == "__main__":
    main()
