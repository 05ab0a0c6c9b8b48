"""The shapes of replies, for the schema; replies themselves are built in wire.py."""

from typing import Any

from pydantic import BaseModel, Field, RootModel


class Error(BaseModel):
    """What went wrong."""

    detail: str = Field(examples=["Task not found"])


class RecordReply(BaseModel):
    """One task."""

    id: int = Field(examples=[17], description="Row number; -1 in the immediate reply of an asynchronous call.")
    task_id: str = Field(examples=["0ff078640d894bc5a59242c05657a994"])
    req_params: dict[str, Any] = Field(description="The request after resolution; posting it reproduces the task.")
    in_queue_mills: int = Field(description="When it was queued, milliseconds since the epoch; -1 for not yet.")
    start_mills: int = Field(description="When the worker took it; -1 for not yet.")
    finish_mills: int = Field(description="When it ended; -1 for not yet.")
    task_status: str = Field(examples=["finished"], description="pending, running, finished, stop, skip or error.")
    progress: float = Field(description="0 to 100; -1 before the start.")
    preview: str | None = Field(None, description="Base64 PNG without prefix, while the task runs.")
    webhook_url: str = ""
    result: list[str] = Field(description="URLs of the pictures.")
    seeds: list[int] = Field([], description="One per picture: the seed that gives it alone.")
    source: str = Field("api", description="api, webui or cli.")
    error: str | None = Field(None, description="With status error only.")
    notes: list[str] = Field([], description="Sentences for the person who asked.")
    model: str = Field("", description="Checkpoint that drew the pictures.")
    position: int | None = Field(None, description="Tasks ahead of a waiting one.")
    eta_seconds: float | None = Field(None, description="Estimated seconds until the end; null when unknown.")
    result_base64: list[str] | None = Field(None, description="Data URIs, if `require_base64` was sent.")


class TaskLists(BaseModel):
    """Tasks by state; lists that were not asked for are empty."""

    history: list[RecordReply]
    current: list[RecordReply]
    pending: list[RecordReply]


class ControlReply(BaseModel):
    """What a control action did."""

    message: str = Field(examples=["task stopped"])


class QueueReply(BaseModel):
    """The queue after what was asked."""

    paused: bool = Field(description="No waiting task is started.")
    running: str | None = Field(description="Id of the task in work.")
    waiting: list[str] = Field(description="Ids of the tasks that wait, next one first.")


class ModelNames(BaseModel):
    """Model files present."""

    model_filenames: list[str]
    lora_filenames: list[str]


class Description(BaseModel):
    """Words for a picture."""

    describe: str


class Names(RootModel[list[str]]):
    """Names that a request may hold."""


class Health(BaseModel):
    """State of the server."""

    status: str = Field(examples=["ok"])


SHAPES: tuple[type[BaseModel], ...] = (
    Error,
    RecordReply,
    TaskLists,
    ControlReply,
    QueueReply,
    ModelNames,
    Description,
    Names,
    Health,
)
