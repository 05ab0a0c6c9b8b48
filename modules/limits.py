"""Token buckets: how often someone may do something."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable

_MOST_REMEMBERED = 10_000


class TokenBuckets:
    """One bucket per name; each holds a minute's worth of tokens and fills up evenly."""

    def __init__(self, per_minute: int, clock_s: Callable[[], float] = time.monotonic) -> None:
        """Allow `per_minute` takes per name and minute; 0 allows any number."""
        self._per_minute = per_minute
        self._clock_s = clock_s
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, name: str) -> int:
        """Take a token: 0 when there was one, else the seconds (at least 1) until there is."""
        if self._per_minute <= 0:
            return 0
        now_s = self._clock_s()
        level, then_s = self._levels.pop(name, (float(self._per_minute), now_s))
        level = min(self._per_minute, level + (now_s - then_s) * self._per_minute / 60)
        is_there = level >= 1
        self._levels[name] = (level - 1 if is_there else level, now_s)
        while len(self._levels) > _MOST_REMEMBERED:
            self._levels.popitem(last=False)
        return 0 if is_there else max(1, math.ceil((1 - level) * 60 / self._per_minute))
