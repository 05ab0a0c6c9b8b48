"""Ranks of tasks in the queue: between any two there is room for another."""

from typing import TypeAlias

Rank: TypeAlias = tuple[int, ...]
"""Compared from the left; a longer rank comes after its own beginning. Two numbers or more."""


def rank_between(before: Rank | None, behind: Rank | None) -> Rank | None:
    """A rank after `before` and before `behind`; None for an open end, and when both ends are open.

    Only ranks of three numbers and more count up: two numbers are priority and id, and the next id is the next task's.
    """
    if before is None:
        return (*behind[:-1], behind[-1] - 1) if behind else None
    if behind and behind[: len(before)] == before:
        return (*before, behind[len(before)] - 1)
    next_one = (*before[:-1], before[-1] + 1)
    if len(before) > 2 and (behind is None or next_one < behind):
        return next_one
    return (*before, 0)
