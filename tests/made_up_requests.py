"""Sends requests made up from the schema to a server with the fake engine, and counts them.

    python -m tests.made_up_requests                          5,000 cases, seed 1; some minutes
    python -m tests.made_up_requests --cases 200 --seed 7

Prints what schemathesis says, how many cases it made, how many requests the server counted, and their statuses.
Exits with 1 on an answer that the schema does not declare, on a 5xx, or when fewer cases were sent than asked for.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_headers_conformance,response_schema_conformance"
)
SPARE = 2.0  # some operations have few different cases, one without parameters has one; the others make up for them
_REQUESTS = re.compile(r'^focale_http_requests_total\{.*status="(\d+)"\} ([\d.]+)$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a run.

    cases: made by schemathesis, each sent at least once. statuses: answers by status, as the server counted them.
    """

    has_passed: bool
    report: str
    cases: int
    statuses: Counter[str]


@contextmanager
def fake_server() -> Iterator[str]:
    """URL of a server with the fake engine, in a process of its own."""
    command = [sys.executable, "-m", "tests.fake_server", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().split()[1]
        finally:
            server.terminate()


def send(url: str, cases: int, seed: int, folder: Path) -> Outcome:
    """Send at least `cases` requests to the server at `url`; `folder` takes what schemathesis leaves behind."""
    operations = sum(len(methods) for methods in httpx.get(f"{url}/openapi.json").json()["paths"].values())
    each = max(2, round(cases / operations * SPARE))
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json",
        "--max-examples", str(each), "--seed", str(seed), "--phases", "fuzzing", "--checks", CHECKS,
    ]  # fmt: skip
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    made = re.search(r"([\d,]+) generated", done.stdout)
    statuses = Counter[str]()
    for status, count in _REQUESTS.findall(httpx.get(f"{url}/metrics", timeout=30).text):
        statuses[status] += int(float(count))
    return Outcome(done.returncode == 0, done.stdout, int(made[1].replace(",", "")) if made else 0, statuses)


def main() -> int:
    """Run once and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, fake_server() as url:
        outcome = send(url, arguments.cases, arguments.seed, Path(folder))
    print(outcome.report)
    errors = sum(count for status, count in outcome.statuses.items() if status.startswith("5"))
    shown = ", ".join(f"{status}: {count:,}" for status, count in sorted(outcome.statuses.items()))
    print(f"seed {arguments.seed}: {outcome.cases:,} cases; the server counted {outcome.statuses.total():,} requests")
    print(f"answers by status: {shown}; 5xx: {errors}")
    return 0 if outcome.has_passed and not errors and outcome.cases >= arguments.cases else 1


if __name__ == "__main__":
    sys.exit(main())
