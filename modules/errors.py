"""The exception tree: everything Focale raises on purpose, each class saying when it occurs."""

from collections.abc import Iterable
from difflib import get_close_matches


class FocaleError(Exception):
    """Base of every error that Focale raises on purpose; `str(error)` is a sentence for the person who gets it."""


class InvalidRequest(FocaleError):
    """A value in a request cannot be used; nothing was queued.

    field: wire name of the offending field, or a path such as ("loras", 0, "model_name").
    value: what was sent.
    """

    kind = "value_error"

    def __init__(self, field: str | tuple[str | int, ...], message: str, value: object = None) -> None:
        self.field: tuple[str | int, ...] = (field,) if isinstance(field, str) else tuple(field)
        self.message = message
        self.value = value
        super().__init__(f"{'.'.join(str(part) for part in self.field)}: {message}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuilt, (type(self), self.args, self.__dict__)


class UnknownName(InvalidRequest):
    """A model, sampler, scheduler, style or preset name is not in the list; carries the near matches."""

    kind = "unknown_name"

    def __init__(self, field: str | tuple[str | int, ...], name: str, known: Iterable[str], *, what: str) -> None:
        names = list(known)
        self.near = near_matches(name, names)
        hint = (
            "Did you mean " + " or ".join(repr(near) for near in self.near) + "?"
            if self.near
            else f"{len(names)} {'is' if len(names) == 1 else 'are'} known."
        )
        super().__init__(field, f"{name!r} is not a known {what}. {hint}", name)


class NotSupportedYet(InvalidRequest):
    """A request asks for something this version cannot compute, and a wrong picture would be worse than none."""

    kind = "not_supported"


class UnreadableImage(InvalidRequest):
    """An input image could not be fetched, decoded or accepted."""

    kind = "image"


class FetchRefused(FocaleError):
    """A URL may not be contacted, or its answer was refused (address, size, time, redirects)."""


class DownloadFailed(FocaleError):
    """A model file could not be fetched, or is not what it should be; the message names the URL and the way out."""


class ModelFileMissing(FocaleError):
    """A model file that was named is not in its folder."""


class ModelFileUnusable(FocaleError):
    """A model file exists but cannot be used: truncated, a pickle, or not of the architecture needed."""


class NotFound(FocaleError):
    """A task, file or preset with this name does not exist."""


class QueueFull(FocaleError):
    """The queue has reached its configured limit.

    retry_after_s: seconds after which trying again makes sense.
    """

    def __init__(self, message: str, retry_after_s: int = 5) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class IllegalTransition(FocaleError):
    """A task was told to do something its state does not allow."""


class WorkerDied(FocaleError):
    """The worker process ended while a task was in it."""


class EngineFailed(FocaleError):
    """The worker reported a failure of a task; the message is the reason."""


class HistoryLocked(FocaleError):
    """Another server already writes the history of this output folder."""


class HistoryDamaged(FocaleError):
    """The history file holds frames that cannot be read."""


class StorageFull(FocaleError):
    """Writing to the disk failed: no space left, or the folder is read-only."""


class PortTaken(FocaleError):
    """A port Focale should listen on is in use."""


class SettingsError(FocaleError):
    """A command line flag, environment variable or configuration value cannot be used."""


class ExtensionFailed(FocaleError):
    """An extension could not be loaded or started."""


class Interrupted(FocaleError):
    """A running task was told to stop or to skip the image in work; never reaches a user as an error."""

    def __init__(self, action: str) -> None:
        super().__init__(action)
        self.action = action


def _rebuilt(kind: type[Exception], args: tuple[object, ...], state: dict[str, object]) -> Exception:
    """An exception as it was before it travelled from one process to another."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


def near_matches(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """Up to `limit` known names that look like `name`, best first; letter case does not count."""
    by_fold: dict[str, str] = {}
    for candidate in known:
        by_fold.setdefault(candidate.casefold(), candidate)
    found = get_close_matches(name.casefold(), list(by_fold), n=limit, cutoff=0.5)
    return [by_fold[fold] for fold in found]
