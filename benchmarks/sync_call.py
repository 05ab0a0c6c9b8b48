"""Wall time of a synchronous REST call of the embedded model beside its model time.

python -m benchmarks.sync_call
python -m benchmarks.sync_call -- --unet-in-bf16 --vae-in-bf16      with these flags of the server
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import requests

from benchmarks.live_server import live_server
from modules.events import Finished, Progress
from modules.extensions import Services

BAR = 1.10
FIRST_CALL_BAR_S = 4.0
PICTURE_BAR_S = 1.5
FIRST_EVENT_BAR_MS = 50
SIZE = {"aspect_ratios_selection": "128*128"}


def call(url: str, seed: int) -> tuple[float, str]:
    """One synchronous call for a picture of 128 px at Speed; seconds and task id."""
    body = {"prompt": "a red apple", "image_seed": seed, "style_selections": []} | SIZE
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


async def measure(rounds: int, outputs: Path, flags: Sequence[str]) -> None:
    """Serve, call and print."""
    async with live_server(outputs, flags) as (services, url):
        began = time.perf_counter()
        await asyncio.to_thread(call, url, 0)
        first = time.perf_counter() - began
        print(f"first call after start, worker start included: {first:.2f} s (bar {FIRST_CALL_BAR_S:g})")
        ratios, walls = [], []
        for seed in range(1, rounds + 1):
            wall, task_id = await asyncio.to_thread(call, url, seed)
            job = services.jobs.get(task_id)
            assert job is not None
            finished = [event async for _, event in job.log.follow()][-1]
            assert isinstance(finished, Finished)
            walls.append(wall)
            ratios.append(wall / finished.model_seconds)
        median, best = statistics.median(walls), min(walls)
        print(f"one picture, 30 steps: median {median:.2f} s, best {best:.2f} s (bar {PICTURE_BAR_S:g})")
        print(f"wall ÷ inside the networks: median {statistics.median(ratios):.3f} (bar {BAR})")
        latency = await first_progress_ms(services, url)
        print(f"first progress event after {latency:.0f} ms (bar {FIRST_EVENT_BAR_MS})")


def main() -> None:
    """Measure in a temporary output folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("flags", nargs="*", help="flags of the server, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="focale-bench-") as folder:
        asyncio.run(measure(arguments.rounds, Path(folder), arguments.flags))


if __name__ == "__main__":
    main()
