"""`python -m benchmarks.long_run`: memory of server and worker after 200 pictures beside that after 20."""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

import psutil
import requests

from benchmarks.live_server import live_server

BAR = 1.05
FIRST, LAST = 20, 200


def draw(url: str, seed: int) -> None:
    """One picture of few steps, so that all but the networks is done as often as in a long day."""
    body = {"prompt": f"a red apple {seed}", "image_seed": seed, "overwrite_step": 2, "style_selections": []}
    record = requests.post(f"{url}/v1/engine/generate/", json=body, timeout=600).json()
    assert record["task_status"] == "finished", record


def resident_mib() -> dict[str, float]:
    """Resident memory of this process, which is the server, and of the worker, its largest child."""
    here = psutil.Process()
    worker = max((child.memory_info().rss for child in here.children(recursive=True)), default=0)
    return {"server": here.memory_info().rss / 2**20, "worker": worker / 2**20}


async def measure(pictures: int, outputs: Path) -> bool:
    """Draw, print memory now and then, and tell whether the bar holds."""
    early: dict[str, float] = {}
    async with live_server(outputs) as (_, url):
        for number in range(1, pictures + 1):
            await asyncio.to_thread(draw, url, number)
            if number in (FIRST, pictures) or number % 50 == 0:
                now = resident_mib()
                early = early or now
                print(f"{number} pictures: " + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in now.items()))
    growth = {name: now[name] / early[name] for name in now}
    print(", ".join(f"{name} × {ratio:.3f}" for name, ratio in growth.items()) + f" (bar {BAR})")
    return max(growth.values()) <= BAR


def main() -> int:
    """Measure in a temporary output folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=LAST)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="focale-bench-") as folder:
        return 0 if asyncio.run(measure(arguments.pictures, Path(folder))) else 1


if __name__ == "__main__":
    sys.exit(main())
