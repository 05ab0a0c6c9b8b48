"""How long `python launch.py` takes until it answers, what that costs, and how much memory the web process then has.

    python -m benchmarks.start                 15 starts without a page, 5 with it
    python -m benchmarks.start --starts 30 --with-page 0

Every start has a history of its own; the first one, which may read from a cold disk, is told and not judged.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 120
BARS_S = {"without a page": 1.0, "with the page": 5.0}


@dataclass(frozen=True)
class Start:
    """One start.

    Attributes:
        ready_s: wall time from the command to the first answer of `/readyz`.
        cpu_s: processor time of the web process until then.
        memory_mib: its resident memory then.
    """

    ready_s: float
    cpu_s: float
    memory_mib: float


def free_ports() -> tuple[int, int]:
    """Two ports that nobody listens on."""
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def start_once(folder: Path, flags: Sequence[str]) -> Start:
    """Start a server, wait until it is ready, and end it."""
    page_port, api_port = free_ports()
    command = [sys.executable, str(ROOT / "launch.py"), "--port", str(page_port), "--disable-in-browser", *flags]
    command += ["--output-path", str(folder), "--temp-path", str(folder / "temp")]
    begin = time.perf_counter()
    server = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"API_PORT": str(api_port)}, stderr=subprocess.DEVNULL
    )
    try:
        wait_until_ready(server, f"http://127.0.0.1:{page_port}/readyz")
        ready = time.perf_counter() - begin
        process = psutil.Process(server.pid)
        spent = process.cpu_times()
        return Start(ready, spent.user + spent.system, process.memory_info().rss / 2**20)
    finally:
        server.terminate()
        server.wait(30)


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    """Return when the server answers.

    Raises:
        RuntimeError: it ended, or does not answer in time.
    """
    end = time.monotonic() + PATIENCE_S
    while server.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.005)
    raise RuntimeError(f"the server did not get ready (exit code {server.poll()})")


def measure(name: str, flags: Sequence[str], starts: int) -> bool:
    """Print what the starts took; returns whether every one but the first met the bar."""
    with tempfile.TemporaryDirectory() as folder:
        made = [start_once(Path(folder) / str(number), flags) for number in range(starts + 1)]
    times = sorted(start.ready_s for start in made[1:])
    bar = BARS_S[name]
    print(f"{name}: first {made[0].ready_s:.2f} s; then {starts} starts, ready after " + _range(times, "s"))
    print("    processor time " + _range(sorted(start.cpu_s for start in made[1:]), "s"))
    print("    memory " + _range(sorted(start.memory_mib for start in made[1:]), "MiB", digits=0))
    print(
        f"    below {bar:g} s: {sum(seconds < bar for seconds in times)} of {starts}; worst ÷ bar {times[-1] / bar:.2f}"
    )
    return times[-1] < bar


def _range(values: list[float], unit: str, *, digits: int = 2) -> str:
    low, middle, high = values[0], statistics.median(values), values[-1]
    return f"{low:.{digits}f}–{high:.{digits}f} {unit}, median {middle:.{digits}f}"


def main() -> int:
    """Print both kinds of start; exit code 1 if a bar was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=15, help="starts without a page")
    parser.add_argument("--with-page", type=int, default=5, help="starts with the page")
    arguments = parser.parse_args()
    met = [
        measure(name, flags, starts)
        for name, flags, starts in (
            ("without a page", ["--nowebui"], arguments.starts),
            ("with the page", [], arguments.with_page),
        )
        if starts
    ]
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
