"""What a person may ask of a running task, carried from the thread that hears it to the loop that obeys."""

import threading
from typing import Literal, TypeAlias

from modules.errors import Interrupted

Action: TypeAlias = Literal["stop", "skip", "yield"]


class Control:
    """The wishes for one task; `ask` may be called from any thread, the rest belongs to the thread that runs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stop = False
        self._yield = False
        self._skips = 0

    def ask(self, action: Action) -> None:
        """Note a wish: stop the task, skip the image in work, or yield before the next image."""
        with self._lock:
            if action == "stop":
                self._stop = True
            elif action == "skip":
                self._skips += 1
            else:
                self._yield = True

    def check(self) -> None:
        """Called before every model evaluation and between the stages of an image.

        Raises:
            Interrupted: stop was asked for.
        """
        if self._stop:
            raise Interrupted("stop")

    def take_skips(self) -> int:
        """How many images should be dropped since the last call."""
        with self._lock:
            skips, self._skips = self._skips, 0
            return skips

    @property
    def should_yield(self) -> bool:
        """True when a task of higher priority waits."""
        return self._yield
