"""Splits the pictures of a task into batches that the model computes together."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")

# Latents (h · w, summed over the rows) that one evaluation should hold at most. Below, the fixed costs of a call
# dominate and batching gains; above, a CPU gains nothing and an accelerator runs out of memory.
LATENTS_PER_CALL = {"cpu": 4096, "cuda": 65536}
MAX_ROWS = 16


def rows_per_batch(height: int, width: int, device: torch.device, *, deterministic: bool = False) -> int:
    """How many pictures are computed together.

    Args:
        height, width: of the latents.
        deterministic: one, so that every picture has the bits of its single run.
    """
    if deterministic:
        return 1
    budget = LATENTS_PER_CALL.get(device.type, LATENTS_PER_CALL["cpu"])
    return max(1, min(MAX_ROWS, budget // (height * width)))


def split_into_batches(items: Sequence[Item], rows: int, key: Callable[[Item], object]) -> list[tuple[Item, ...]]:
    """Consecutive items of equal key, at most `rows` together; depends on nothing but the items.

    Args:
        key: items may share a batch only when it is equal, for example their LoRAs and numbers of tokens.
    """
    batches: list[list[Item]] = []
    for item in items:
        if batches and len(batches[-1]) < rows and key(batches[-1][0]) == key(item):
            batches[-1].append(item)
        else:
            batches.append([item])
    return [tuple(batch) for batch in batches]
