"""Tells whoever listens in this process when model weights were loaded.

Loading happens deep in the engine, for tasks, tools and at the start; counting it is the business of someone far away.
The worker passes what it hears on to the web process, which tells it once more.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["checkpoint", "refiner", "vae", "lora", "tool"]


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """Weights were read and are ready for use.

    name: file name. seconds: from opening the file.
    """

    kind: Kind
    name: str
    seconds: float


Listener: TypeAlias = Callable[[ModelLoad], None]

_listeners: list[Listener] = []


def listen(listener: Listener) -> Callable[[], None]:
    """Call `listener` after each load, in the thread that made it; the function returned ends that."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def tell(load: ModelLoad) -> None:
    """Weights were loaded."""
    for listener in tuple(_listeners):
        listener(load)


@contextmanager
def loading(kind: Kind, name: str) -> Iterator[None]:
    """Tell that weights were loaded when the context ends well."""
    began = time.perf_counter()
    yield
    tell(ModelLoad(kind, name, time.perf_counter() - began))
