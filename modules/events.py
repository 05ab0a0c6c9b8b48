"""What happens to a task, as a list of typed events: the log that page, SSE, polling, webhooks and history follow."""

from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Queued:
    """The task was accepted and stored.

    position: tasks ahead of it, the running one included.
    """

    position: int


@dataclass(frozen=True, slots=True)
class Started:
    """The worker took the task.

    attempt: 1 for the first try.
    """

    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Planned:
    """The worker knows what it will draw.

    model: file name of the checkpoint; width, height: pixels of each picture; steps: sampling steps of each.
    """

    model: str
    width: int
    height: int
    steps: int
    images: int


@dataclass(frozen=True, slots=True)
class Progress:
    """A step was made; only the newest one matters to a follower that lags.

    percent: 0–100, never falls within an attempt.
    message: step text, for example `Sampling step 3/30, image 1/2 ...`.
    preview: JPEG bytes of at most 512 px, or None when the step has no picture.
    step, steps: model evaluations done and planned for the images in work; 0 outside sampling.
    image, images: 1-based image in work, and how many were asked; 0 before the first.
    """

    percent: int
    message: str
    preview: bytes | None = field(default=None, repr=False)
    step: int = 0
    steps: int = 0
    image: int = 0
    images: int = 0


@dataclass(frozen=True, slots=True)
class ImageSaved:
    """One result is on the disk.

    path: POSIX path relative to the output folder.
    index: 0-based number of the image within the task; -1 for a contact sheet.
    seed: the seed that gives this image alone.
    """

    path: str
    index: int
    seed: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Noticed:
    """Something the person who asked should know, for example that the demo model stood in for a missing file."""

    message: str


@dataclass(frozen=True, slots=True)
class ImageSkipped:
    """The image in work was dropped because someone asked to skip it."""

    index: int


@dataclass(frozen=True, slots=True)
class Retrying:
    """The attempt was lost through no fault of the request; the task starts again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Yielded:
    """The attempt ended between two images to let a task of higher priority go first; it goes on later."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The task is done.

    model_seconds: time spent inside the networks; wall_seconds: time from start to end in the worker.
    evaluations: how often the model was asked for an estimate, over all batches of this attempt.
    """

    model_seconds: float = 0.0
    wall_seconds: float = 0.0
    evaluations: int = 0


@dataclass(frozen=True, slots=True)
class Stopped:
    """The task was stopped; results made before are kept."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """Every image of the task was skipped."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The task ended with an error.

    error: one clear sentence; kind: class name of the error.
    """

    error: str
    kind: str = "EngineFailed"


Event: TypeAlias = (
    Queued
    | Started
    | Planned
    | Progress
    | ImageSaved
    | Noticed
    | ImageSkipped
    | Retrying
    | Yielded
    | Finished
    | Stopped
    | Skipped
    | Failed
)
FinalEvent: TypeAlias = Finished | Stopped | Skipped | Failed


def is_final(event: Event) -> bool:
    """True for the one event that ends a task's log."""
    return isinstance(event, Finished | Stopped | Skipped | Failed)
