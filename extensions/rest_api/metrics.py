"""Prometheus metrics of queue, tasks and requests."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from modules.events import Event, Finished, ImageSaved, Progress, Retrying, Started, is_final
from modules.extensions import AsgiApp, Message, Receive, Scope, Send
from modules.jobs import Job, JobQueue
from modules.loads import ModelLoad, listen

_LONG_S = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_STEP_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


@dataclass(frozen=True, slots=True)
class _Step:
    task_id: str
    step: int
    at_s: float


class Metrics:
    """Counts what happens; `render` gives the text that Prometheus reads."""

    def __init__(self, jobs: JobQueue, clock_s: Callable[[], float] = time.monotonic) -> None:
        """Watch `jobs`."""
        registry = CollectorRegistry()
        self._registry = registry
        self._clock_s = clock_s
        self._last_step: _Step | None = None
        ProcessCollector(registry=registry)
        waiting = Gauge("focale_queue_length", "Tasks that wait.", registry=registry)
        waiting.set_function(lambda: len(jobs.waiting))
        running = Gauge("focale_tasks_running", "Tasks in work.", registry=registry)
        running.set_function(lambda: 1 if jobs.running else 0)
        worker = Gauge("focale_worker_resident_bytes", "Memory of the worker process.", registry=registry)
        worker.set_function(_memory_of_children)
        self._wait_s = Histogram(
            "focale_task_wait_seconds", "Time from acceptance to start.", buckets=_LONG_S, registry=registry
        )
        self._run_s = Histogram(
            "focale_task_run_seconds", "Time from start to end.", buckets=_LONG_S, registry=registry
        )
        self._model_s = Histogram(
            "focale_task_model_seconds", "Time inside the networks, per task.", buckets=_LONG_S, registry=registry
        )
        self._step_s = Histogram(
            "focale_step_seconds", "Time between two sampling steps.", buckets=_STEP_S, registry=registry
        )
        self._load_s = Histogram(
            "focale_model_load_seconds", "Time to load model weights.", ["kind"], buckets=_LONG_S, registry=registry
        )
        self._loads = Counter("focale_model_loads", "Model weights loaded, by kind.", ["kind"], registry=registry)
        self.close = listen(self._on_load)
        """Listen for loads no longer."""
        self._tasks = Counter("focale_tasks", "Ended tasks by status.", ["status", "source"], registry=registry)
        self._images = Counter("focale_images", "Pictures saved.", registry=registry)
        self._retries = Counter("focale_task_retries", "Attempts lost with the worker.", registry=registry)
        self._requests = Counter(
            "focale_http_requests", "Requests by route.", ["method", "route", "status"], registry=registry
        )
        self._request_s = Histogram(
            "focale_http_request_seconds", "Time to the end of the answer.", ["method", "route"],
            buckets=(0.005, 0.02, 0.1, 0.5, *_LONG_S[2:]), registry=registry,
        )  # fmt: skip

    def on_event(self, job: Job, event: Event) -> None:
        """Count an event of a task."""
        record = job.record
        if isinstance(event, Progress):
            self._measure_step(job.task_id, event)
        elif isinstance(event, Started):
            self._wait_s.observe(max(0, record.start_mills - record.in_queue_mills) / 1000)
        elif isinstance(event, ImageSaved):
            self._images.inc()
        elif isinstance(event, Retrying):
            self._retries.inc()
        elif is_final(event):
            self._tasks.labels(record.task_status.value, record.source.value).inc()
            if isinstance(event, Finished):
                self._model_s.observe(event.model_seconds)
            if record.start_mills >= 0:
                self._run_s.observe(max(0, record.finish_mills - record.start_mills) / 1000)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request by the template of its path, never by the path."""
        self._requests.labels(method, route, str(status)).inc()
        self._request_s.labels(method, route).observe(seconds)

    def render(self) -> tuple[bytes, str]:
        """The metrics and their media type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _on_load(self, load: ModelLoad) -> None:
        self._loads.labels(load.kind).inc()
        self._load_s.labels(load.kind).observe(load.seconds)

    def _measure_step(self, task_id: str, event: Progress) -> None:
        now_s, last = self._clock_s(), self._last_step
        if last and last.step and last.task_id == task_id and event.step == last.step + 1:
            self._step_s.observe(now_s - last.at_s)
        self._last_step = _Step(task_id, event.step, now_s)


class CountRequests:
    """ASGI middleware that tells `Metrics` of every request."""

    def __init__(self, app: AsgiApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, and count."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s, status = time.perf_counter(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.request(_method(scope["method"]), route, status, time.perf_counter() - began_s)


def _memory_of_children() -> float:
    """Resident bytes of the processes this one started."""
    import psutil  # only whoever asks for metrics waits for it

    total = 0.0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            total += child.memory_info().rss
    return total


def _method(method: str) -> str:
    """A known method; anybody can invent more."""
    return method if method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "other"
