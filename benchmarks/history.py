"""Measures the history at growing sizes, with plain TinyDB beside it where that can still run.

    python -m benchmarks.history                  100, 10,000 and 100,000 records
    python -m benchmarks.history --million        and 1,000,000
    python -m benchmarks.history --sizes 100 1000 --folder /tmp

Prints milliseconds per call (median, and p99 for reads), and how much longer writing takes than on a history of 100
records that is written in turns with it. Exits with 1 when the budget is missed: writing grows at most twofold up to
100,000 records, and the p99 of reads is at most 25 ms.
"""

import argparse
import gc
import random
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tinydb import TinyDB, where
from tinydb.table import Document, Table

from modules.choices import Source, TaskStatus
from modules.history import FILE_NAME, FINAL, History, HistoryFilter
from modules.record import Record
from modules.request import GenerationRequest, to_params

WORDS = [f"{first}{second}" for first in "bcdfghklmnprstvwz" for second in ("alo", "ern", "ist", "omp", "ulk", "yra")]
PLAIN_LIMIT = 10_000  # a plain TinyDB rewrites its file at every call: 30 MiB here, a second each
SMALL = 100  # records of the history that writing is compared with
WRITES = 60
WRITING = ("insert", "update")
CONTROL = "computing as long as a page"  # what the machine does to any such span; tells a busy one
MAX_GROWTH = 2.0
JUDGED_RECORDS = 100_000  # the budget for growth speaks of this many; above, factors are only printed
MAX_P99_MS = 25.0


def records(count: int) -> Iterator[Record]:
    """Ended tasks with a full request, queued a minute apart, prompts of 12 words of a skewed distribution."""
    chance = random.Random(1)
    params = to_params(GenerationRequest(prompt=""))
    for number in range(count):
        prompt = " ".join(WORDS[int(len(WORDS) * chance.random() ** 3)] for _ in range(12))
        yield Record(
            task_id=f"{number:032x}",
            req_params={**params, "prompt": prompt, "image_seed": chance.randrange(2**63)},
            in_queue_mills=1_700_000_000_000 + 60_000 * number,
            start_mills=1_700_000_001_000 + 60_000 * number,
            finish_mills=1_700_000_020_000 + 60_000 * number,
            task_status=TaskStatus.FINISHED,
            progress=100,
            result=(f"2026-11-22/2026-11-22_10-10-10_{number}.png",),
            seeds=(chance.randrange(2**63),),
            source=chance.choice((Source.API, Source.WEBUI)),
            attempts=1,
            model="juggernautXL_v8Rundiffusion.safetensors",
            width=1152,
            height=896,
        )


def timed(call: Callable[[int], object], times: int) -> list[float]:
    """Milliseconds of each call; the call is given its number."""
    spans = []
    for number in range(times):
        start = time.perf_counter()
        call(number)
        spans.append(1000 * (time.perf_counter() - start))
    return spans


def p99(spans: list[float]) -> float:
    """The 99th percentile."""
    return sorted(spans)[int(0.99 * (len(spans) - 1))]


def fill(folder: Path, count: int) -> float:
    """Write `count` records as an import would, and give the seconds it took."""
    start = time.perf_counter()
    with History(folder, sync="never") as history:
        batch = []
        for record in records(count):
            batch.append(record)
            if len(batch) == 1000:
                history.add_many(batch)
                batch = []
        history.add_many(batch)
    return time.perf_counter() - start


def measure(folder: Path, count: int, sync: str) -> dict[str, float]:
    """Milliseconds of each operation on a history of `count` records, and sizes."""
    filled_s = fill(folder, count)
    gc.collect()
    memory = rss_mib()
    start = time.perf_counter()
    history = History(folder, sync=sync)  # type: ignore[arg-type]
    opened_s = time.perf_counter() - start
    memory = rss_mib() - memory
    fill(folder / "small", SMALL)
    small = History(folder / "small", sync=sync)  # type: ignore[arg-type]
    chance = random.Random(2)
    some = [f"{chance.randrange(count):032x}" for _ in range(2000)]

    def window(number: int) -> None:
        first = 1_700_000_000_000 + 60_000 * chance.randrange(count)
        history.page(start_mills=first, end_mills=first + 3_600_000)

    start = time.perf_counter()
    history.read_terms()
    words_s = time.perf_counter() - start
    pages = count // 10
    spans = {
        **write_spans(history, small, some),
        "update one of the last": timed(lambda n: history.update(f"new{n}", progress=float(n)), WRITES),
        "get": timed(lambda n: history.get(some[n]), 2000),
        "page": timed(lambda n: history.page(page=0), 1000),
        "deep page": timed(lambda n: history.page(page=chance.randrange(pages)), 1000),
        "page of an hour": timed(window, 1000),
        "search one word": timed(lambda n: history.search(HistoryFilter(words=WORDS[n])), 20),
        "search two words": timed(lambda n: history.search(HistoryFilter(words=f"{WORDS[n]} {WORDS[n + 1]}")), 20),
        "search a seed": timed(lambda n: history.search(HistoryFilter(seed=n)), 20),
        "TinyDB query, hot": timed(lambda n: history.table.search(where("task_id") == some[n]), 3),
    }
    spans["get, page beside a writer"] = beside_a_writer(history, some)
    spans[CONTROL] = timed(lambda _: compute_for(statistics.median(spans["page"])), 1000)
    result = {name: statistics.median(values) for name, values in spans.items()}
    for name in WRITING:
        result[growth_of(name)] = result[name] / result.pop(beside(name))
    for name in ("get", "page", "deep page", "page of an hour", "get, page beside a writer", CONTROL):
        result[f"{name} p99"] = p99(spans[name])
    start = time.perf_counter()
    history.storage.compact()
    result["compact s"] = time.perf_counter() - start
    history.close()
    small.close()
    sizes = {"fill s": filled_s, "open s": opened_s, "read words s": words_s, "memory MiB": memory}
    return result | sizes | {"file MiB": (folder / FILE_NAME).stat().st_size / 2**20}


def write_spans(history: History, small: History, some: list[str]) -> dict[str, list[float]]:
    """Milliseconds of writing to the history and to a small one, in turns: the disk has its moods."""
    template = next(records(1))
    spans: dict[str, list[float]] = {name: [] for known in WRITING for name in (known, beside(known))}

    def insert(into: History, number: int) -> None:
        into.add(template.model_copy(update={"task_id": f"new{number}", "in_queue_mills": 1_900_000_000_000}))

    def update(into: History, number: int) -> None:
        task_id = some[number] if into is history else f"{number % SMALL:032x}"
        into.update(task_id, task_status="finished", progress=float(number))

    for name, write in zip(WRITING, (insert, update), strict=True):
        for number in range(WRITES):
            for into, row in ((history, name), (small, beside(name))):
                spans[row] += timed(lambda _, into=into, write=write, number=number: write(into, number), 1)
    return spans


def beside(name: str) -> str:
    """The row of the same operation on the small history."""
    return f"{name}, {SMALL} records"


def growth_of(name: str) -> str:
    """The row of how much longer an operation takes here than on the small history."""
    return f"{name} ÷ {SMALL} records"


def compute_for(span_ms: float) -> int:
    """Compute for as long as `span_ms` takes an idle processor."""
    end, number = time.thread_time() + span_ms / 1000, 0
    while time.thread_time() < end:
        number += 1
    return number


def beside_a_writer(history: History, some: list[str]) -> list[float]:
    """Milliseconds of gets and pages while another thread writes and a compaction runs."""
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            history.update(f"new{number % 60}", progress=float(number % 100))

    threads = [threading.Thread(target=write), threading.Thread(target=history.storage.compact)]
    for thread in threads:
        thread.start()
    spans = timed(lambda n: history.page() if n % 2 else history.get(some[n]), 1500)
    stop.set()
    for thread in threads:
        thread.join()
    return spans


def measure_plain(folder: Path, count: int) -> dict[str, float]:
    """The same operations on TinyDB's own JSON storage."""
    with TinyDB(folder / "plain.json") as db:
        table = db.table("history")
        table.insert_multiple(record.model_dump(mode="json") for record in records(count))
        times = 20 if count <= 1000 else 3
        middle = [f"{count // 2 + number:032x}" for number in range(times)]
        template = next(records(1)).model_dump(mode="json")
        spans = {
            "insert": timed(lambda n: table.insert({**template, "task_id": f"new{n}"}), times),
            "update": timed(lambda n: table.update({"progress": n}, where("task_id") == middle[n]), times),
            "get": timed(lambda n: table.get(where("task_id") == middle[n]), times),
            "page": timed(lambda _: plain_page(table), times),
        }
    return {name: statistics.median(values) for name, values in spans.items()}


def plain_page(table: Table) -> list[Document]:
    """The last ten ended tasks; without TinyDB's cache of results, which any write empties."""
    table.clear_cache()
    return table.search(where("task_status").one_of(list(FINAL)))[-10:]


def rss_mib() -> float:
    """Resident memory of this process."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 2**20


def main() -> int:
    """Measure, print the table and judge it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 10_000, 100_000])
    parser.add_argument("--million", action="store_true", help="measure a million records as well")
    parser.add_argument("--sync", choices=["always", "interval", "never"], default="always")
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the disk that is measured")
    parser.add_argument("--no-plain", action="store_true", help="leave plain TinyDB out")
    asked = parser.parse_args()
    sizes = [*asked.sizes, 1_000_000] if asked.million else asked.sizes
    columns: dict[str, dict[str, float]] = {}
    for count in sizes:
        folder = Path(tempfile.mkdtemp(prefix="focale-bench-", dir=asked.folder))
        try:
            columns[f"{count:,}"] = measure(folder, count, asked.sync)
            if count <= PLAIN_LIMIT and not asked.no_plain:
                columns[f"TinyDB {count:,}"] = measure_plain(folder, count)
        finally:
            shutil.rmtree(folder)
    show(columns)
    return judge({count: columns[f"{count:,}"] for count in sizes})


def show(columns: dict[str, dict[str, float]]) -> None:
    """Print the columns side by side."""
    names = next(iter(columns.values()))
    print(f"{'ms per call, median':28}" + "".join(f"{title:>16}" for title in columns))
    for name in names:
        cells = (f"{column[name]:16.3f}" if name in column else f"{'-':>16}" for column in columns.values())
        print(f"{name:28}" + "".join(cells))


def judge(columns: dict[int, dict[str, float]]) -> int:
    """Print the growth of writing and the slowest reads; 1 if a budget is missed."""
    over = False
    for name in map(growth_of, WRITING):
        for size, column in columns.items():
            is_judged = size <= JUDGED_RECORDS
            over |= is_judged and column[name] > MAX_GROWTH
            print(f"{name}, at {size:,}: {column[name]:.2f}" + (f" (at most {MAX_GROWTH})" if is_judged else ""))
    for name in (name for name in next(iter(columns.values())) if name.endswith("p99")):
        slowest = max(column[name] for column in columns.values())
        is_judged = not name.startswith(CONTROL)
        over |= is_judged and slowest > MAX_P99_MS
        print(f"{name}: {slowest:.2f} ms" + (f" (at most {MAX_P99_MS})" if is_judged else ""))
        if not is_judged and slowest > MAX_P99_MS / 2:
            print("This machine is too busy to judge the reads: plain computing waits as long.")
    print("over budget" if over else "within budget")
    return int(over)


if __name__ == "__main__":
    sys.exit(main())
