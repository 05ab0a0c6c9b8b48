"""Estimates when a task ends, from the pace of the tasks before it."""

import time
from collections.abc import Callable

from modules.events import Event, Progress, Started, is_final
from modules.jobs import Job, JobQueue

_WEIGHT_OF_NEWEST = 0.3


class EtaMeter:
    """Measures seconds per model evaluation and per task; knows nothing before the first."""

    def __init__(self, jobs: JobQueue, clock_s: Callable[[], float] = time.monotonic) -> None:
        """Estimate for the tasks of `jobs`."""
        self._jobs = jobs
        self._clock_s = clock_s
        self._task_s: float | None = None
        self._started_s: dict[str, float] = {}
        self._percent_s: float | None = None
        self._last: tuple[str, int, float] | None = None

    def on_event(self, job: Job, event: Event) -> None:
        """Measure."""
        now_s = self._clock_s()
        if isinstance(event, Started):
            self._started_s[job.task_id] = now_s
            self._percent_s, self._last = None, None
        elif isinstance(event, Progress) and event.step:
            self._measure_step(job.task_id, event.percent, now_s)
        elif is_final(event) and (began_s := self._started_s.pop(job.task_id, None)) is not None:
            self._task_s = _blend(self._task_s, (now_s - began_s) / max(1, job.request.image_number))

    def seconds_left(self, task_id: str) -> float | None:
        """Seconds until the task ends, or None while nothing is measured or it has ended."""
        running = self._jobs.running
        if running is not None and running.task_id == task_id:
            return self._of_running(running)
        waiting = list(self._jobs.waiting)
        ahead = next((index for index, job in enumerate(waiting) if job.task_id == task_id), None)
        if ahead is None or self._task_s is None:
            return None
        first = (self._of_running(running) or 0.0) if running is not None else 0.0
        images = sum(job.request.image_number for job in waiting[: ahead + 1])
        return round(first + images * self._task_s, 1)

    def _measure_step(self, task_id: str, percent: int, now_s: float) -> None:
        if self._last and self._last[0] == task_id and percent > self._last[1]:
            pace = (now_s - self._last[2]) / (percent - self._last[1])
            self._percent_s = _blend(self._percent_s, pace)
        if not self._last or self._last[0] != task_id or percent > self._last[1]:
            self._last = (task_id, percent, now_s)

    def _of_running(self, job: Job) -> float | None:
        percent = job.log.progress.percent if job.log.progress else 0
        if self._percent_s is not None:
            return round((100 - percent) * self._percent_s, 1)
        if self._task_s is None:
            return None
        whole_s = self._task_s * job.request.image_number
        return round(max(0.0, whole_s - (self._clock_s() - self._started_s.get(job.task_id, self._clock_s()))), 1)


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT_OF_NEWEST * (new - old)
