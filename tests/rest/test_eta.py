"""Time left, from measured steps and measured tasks."""

import pytest

from extensions.rest_api import eta
from extensions.rest_api.eta import EtaMeter, work_of
from modules.choices import TaskStatus
from modules.events import Finished, Progress, Started
from modules.jobs import Job
from modules.record import Record
from modules.request import GenerationRequest

SPEED = GenerationRequest()


class Queue:
    """The part of a queue that the meter looks at."""

    def __init__(self) -> None:
        self.running: Job | None = None
        self.waiting: list[Job] = []


class Bench:
    """A meter, a queue and a clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.queue = Queue()
        self.meter = EtaMeter(self.queue, lambda: self.now_s)

    def job(self, name: str, **asked: object) -> Job:
        return Job(Record(task_id=name), GenerationRequest(**asked))

    def start(self, job: Job) -> None:
        self.queue.running = job
        self.meter.on_event(job, Started())

    def step(self, job: Job, percent: int, after_s: float) -> None:
        self.now_s += after_s
        event = Progress(percent, "", step=percent, steps=100)
        self.meter.on_event(job, event)
        job.log.append(event)

    def finish(self, job: Job, status: TaskStatus = TaskStatus.FINISHED) -> None:
        job.record = job.record.model_copy(update={"task_status": status})
        self.queue.running = None
        self.meter.on_event(job, Finished())


def ran(bench: Bench, seconds: float, **asked: object) -> None:
    """A task that took that long."""
    job = bench.job("before", **asked)
    bench.start(job)
    bench.now_s += seconds
    bench.finish(job)


async def test_the_running_task_ends_at_the_pace_of_its_steps():
    bench = Bench()
    job = bench.job("a")
    bench.start(job)
    assert bench.meter.seconds_left("a") is None, "nothing is measured yet"
    bench.step(job, 10, after_s=30.0)  # loading models says nothing about steps
    bench.step(job, 20, after_s=5.0)
    assert bench.meter.seconds_left("a") == pytest.approx(40.0)
    bench.finish(job)
    assert bench.meter.seconds_left("a") is None


@pytest.mark.parametrize(
    ("asked", "times"),
    [
        ({}, 1),
        ({"image_number": 3}, 3),
        ({"performance_selection": "Quality"}, 2),
        ({"overwrite_step": 15}, 0.5),
        ({"aspect_ratios_selection": "576*448"}, 0.25),
        ({"overwrite_width": 576, "overwrite_height": 448}, 0.25),
    ],
)
async def test_a_waiting_task_is_measured_by_its_pictures_steps_and_area(asked, times):
    bench = Bench()
    ran(bench, 30.0)
    bench.queue.waiting = [bench.job("next", **asked)]
    assert bench.meter.seconds_left("next") == pytest.approx(30.0 * times, abs=0.1)


async def test_a_waiting_task_waits_for_those_ahead_of_it():
    bench = Bench()
    ran(bench, 30.0)
    running = bench.job("running")
    bench.start(running)
    bench.step(running, 40, after_s=1.0)
    bench.step(running, 50, after_s=2.0)
    bench.queue.waiting = [bench.job("first"), bench.job("second", image_number=2)]
    assert bench.meter.seconds_left("second") == pytest.approx(10.0 + 30.0 + 60.0, abs=0.1)


async def test_a_stopped_task_tells_nothing_about_whole_ones():
    bench = Bench()
    ran(bench, 30.0)
    stopped = bench.job("stopped")
    bench.start(stopped)
    bench.now_s += 1.0
    bench.finish(stopped, TaskStatus.STOP)
    bench.queue.waiting = [bench.job("next")]
    assert bench.meter.seconds_left("next") == pytest.approx(30.0, abs=0.1)


def test_work_is_megapixels_of_evaluations():
    assert work_of(SPEED) == pytest.approx(30 * 1152 * 896 / 1e6)


async def test_a_long_queue_is_estimated_in_one_pass(monkeypatch: pytest.MonkeyPatch):
    bench = Bench()
    ran(bench, 10.0)
    bench.queue.waiting = [bench.job(f"{number}") for number in range(500)]
    looked_at = []
    monkeypatch.setattr(eta, "work_of", lambda request: looked_at.append(request) or work_of(request))
    places = [(place, left_s) for _job, place, left_s in bench.meter.queue()]
    assert places[0] == (0, 10.0)
    assert places[499] == (499, 5000.0)
    assert bench.meter.seconds_left("250") == 2510.0
    assert len(looked_at) == 500
