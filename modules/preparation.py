"""What happens to a waiting task before the engine may take it: its missing model files are fetched, in a thread.

The queue goes on with tasks that lack nothing. The task stays `pending`, so that a server that ends in the middle
simply takes it up again.
"""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from typing import Final, Protocol

from modules.control import Control
from modules.events import Event, Progress
from modules.record import Record

SHARE_PERCENT: Final = 50  # of a task's bar


class Preparer(Protocol):
    """Gets ready what tasks lack; both methods block and are called from threads."""

    def is_needed(self, record: Record) -> bool:
        """True when the task lacks something that `run` can get."""

    def run(self, record: Record, control: Control) -> Iterator[Event]:
        """Get it; yields `Progress` from 0 to 100 % and `Noticed`, and ends early when `control` says stop.

        Raises:
            FocaleError: it cannot be had; the task fails with this sentence.
        """


class NothingToPrepare:
    """The preparer of a queue whose tasks never lack anything."""

    def is_needed(self, record: Record) -> bool:
        """Never."""
        return False

    def run(self, record: Record, control: Control) -> Iterator[Event]:
        """Nothing happens."""
        yield from ()


async def events_from_thread(run: Callable[[Control], Iterator[Event]], name: str) -> AsyncGenerator[Event, None]:
    """The events that `run` yields in a thread of its own.

    When the caller goes away the thread is asked to stop and not waited for: it may hang on a silent server.
    """
    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
    control = Control()

    def tell(message: Event | Exception | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(inbox.put_nowait, message)

    def work() -> None:
        try:
            for event in run(control):
                tell(event)
        except Exception as error:  # raised again where the events are read
            tell(error)
        else:
            tell(None)

    threading.Thread(target=work, name=name, daemon=True).start()
    try:
        while (message := await inbox.get()) is not None:
            if isinstance(message, Exception):
                raise message
            yield message
    finally:
        control.ask("stop")


def while_preparing(event: Event) -> Event:
    """Progress of a preparation as progress of the task: the first half of its bar."""
    return replace(event, percent=event.percent * SHARE_PERCENT // 100) if isinstance(event, Progress) else event


def when_prepared(event: Event) -> Event:
    """Progress of the engine as progress of a task that was prepared: the second half of its bar."""
    if not isinstance(event, Progress):
        return event
    return replace(event, percent=SHARE_PERCENT + event.percent * (100 - SHARE_PERCENT) // 100)
