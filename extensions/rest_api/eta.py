"""Estimates when a task ends, from the steps made so far and the pace of the tasks before it."""

import time
from collections.abc import Callable, Iterator
from weakref import WeakKeyDictionary

from modules.choices import FIXED_BY_PERFORMANCE, TaskStatus
from modules.events import Event, Progress, Started, is_final
from modules.jobs import Job, JobQueue
from modules.params import parse_size
from modules.request import GenerationRequest

_WEIGHT_OF_NEWEST = 0.3


def work_of(request: GenerationRequest) -> float:
    """How much there is to do, in megapixels of model evaluations: pictures · steps · area."""
    width, height = parse_size(request.aspect_ratios_selection)
    width = request.overwrite_width if request.overwrite_width > 0 else width
    height = request.overwrite_height if request.overwrite_height > 0 else height
    facts = FIXED_BY_PERFORMANCE[request.performance_selection]
    steps = request.overwrite_step if request.overwrite_step > 0 else facts.steps
    return request.image_number * steps * width * height / 1e6


class EtaMeter:
    """Measures seconds per percent of the running task and per megapixel step of ended ones."""

    def __init__(self, jobs: JobQueue, clock_s: Callable[[], float] = time.monotonic) -> None:
        """Estimate for the tasks of `jobs`."""
        self._jobs = jobs
        self._clock_s = clock_s
        self._work_s: float | None = None
        self._work: WeakKeyDictionary[Job, float] = WeakKeyDictionary()
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
        elif is_final(event):
            began_s = self._started_s.pop(job.task_id, None)
            did_all = job.record.task_status is TaskStatus.FINISHED
            if began_s is not None and did_all:
                self._work_s = _blend(self._work_s, (now_s - began_s) / work_of(job.request))

    def seconds_left(self, task_id: str) -> float | None:
        """Seconds until the task ends, or None while nothing is measured or it has ended."""
        running = self._jobs.running
        if running is not None and running.task_id == task_id:
            return self._of_running(running)
        return next((left_s for job, _place, left_s in self.queue() if job.task_id == task_id), None)

    def queue(self) -> Iterator[tuple[Job, int, float | None]]:
        """Waiting tasks, next one first: each with its place and the seconds until it ends, None if unmeasured."""
        running = self._jobs.running
        left_s = (self._of_running(running) or 0.0) if running else 0.0
        for place, job in enumerate(self._jobs.waiting, 1 if running else 0):
            if self._work_s is None:
                yield job, place, None
                continue
            if job not in self._work:
                self._work[job] = work_of(job.request)
            left_s += self._work[job] * self._work_s
            yield job, place, round(left_s, 1)

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
        if self._work_s is None:
            return None
        whole_s = self._work_s * work_of(job.request)
        return round(max(0.0, whole_s - (self._clock_s() - self._started_s.get(job.task_id, self._clock_s()))), 1)


def _blend(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT_OF_NEWEST * (new - old)
