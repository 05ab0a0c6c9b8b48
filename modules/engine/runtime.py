"""How torch runs in a worker process."""

from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def use_deterministic_kernels() -> None:
    """From now on use only kernels that repeat their bits, and warn where there is none."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def use_threads(count: int) -> None:
    """From now on compute with this many threads at once; 0 leaves it at one per core."""
    if count:
        torch.set_num_threads(count)


def without_gradients(generator: Callable[P, Iterator[T]]) -> Callable[P, Iterator[T]]:
    """A generator function whose body runs in inference mode; its caller's code between two items does not."""
    return torch.inference_mode()(generator)
