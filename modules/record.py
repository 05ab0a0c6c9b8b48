"""Record: what happened to a task, as history keeps it and the API tells it."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from modules.choices import Source, TaskStatus


class Record(BaseModel):
    """One task, from acceptance to its end. Frozen: a change makes the next record (`model_copy(update=...)`).

    id: row number, given by the history; -1 before that.
    task_id: 32 hexadecimal digits.
    req_params: the request after resolution, as JSON values; posting it again reproduces the task.
    in_queue_mills, start_mills, finish_mills: milliseconds since the Unix epoch; -1 for "not yet".
    progress: 0–100; -1 before the start.
    webhook_url: the URL in effect; "" for none.
    result: POSIX paths relative to the output folder (the API turns them into URLs).
    seeds: one per result, the seed that gives that image alone.
    settled: numbers of the images that are saved or skipped; a new attempt leaves them alone.
    error: one clear sentence, with status `error` only.
    source: api, webui or cli.
    attempts: how often the worker started it.
    notes: sentences for the person who asked, for example that the demo model stood in.
    model: file name of the checkpoint that drew the pictures; "" before the start.
    request_hash: what was asked under an Idempotency-Key, as a hash; "" without one.
    place: where somebody put it in the queue, see `Job.rank`; empty in the order of acceptance.
    width, height: pixels of the pictures; 0 before the first.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: int = -1
    task_id: str = ""
    req_params: dict[str, Any] = Field(default_factory=dict)
    in_queue_mills: int = -1
    start_mills: int = -1
    finish_mills: int = -1
    task_status: TaskStatus = TaskStatus.PENDING
    progress: float = -1
    webhook_url: str = ""
    result: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    settled: tuple[int, ...] = ()
    error: str = ""
    source: Source = Source.API
    attempts: int = 0
    notes: tuple[str, ...] = ()
    model: str = ""
    request_hash: str = ""
    place: tuple[int, ...] = ()
    width: int = 0
    height: int = 0
