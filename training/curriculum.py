"""Which picture comes next: everyday things more often, so that early weights already draw them."""

import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from training.art import ArtSet

EVERYDAY_FILE = Path(__file__).with_name("everyday.txt")


def read_labels(file: Path) -> frozenset[str]:
    """The labels in a text file, one a line."""
    return frozenset(file.read_text(encoding="utf-8").splitlines()) - {""}


def everyday_labels() -> frozenset[str]:
    """Labels of the concepts that prompts name most often."""
    return read_labels(EVERYDAY_FILE)


class Curriculum:
    """Draws rows of latent caches, everyday concepts with a share of their own.

    Args:
        rows: index into the art set's items, per cached row.
        everyday_share: share of draws from everyday concepts, 0–1; None draws every row alike.
        labels: which concepts count as everyday ones.
    """

    def __init__(
        self,
        art: ArtSet,
        rows: Sequence[int],
        *,
        everyday_share: float | None,
        labels: frozenset[str] | None = None,
    ) -> None:
        labels = everyday_labels() if labels is None else labels
        everyday = [art.concepts[art.items[item][0]].label in labels for item in rows]
        count = sum(everyday)
        if everyday_share is None or count in (0, len(rows)):
            weights = [1.0] * len(rows)
        else:
            shares = (1 - everyday_share) / (len(rows) - count), everyday_share / count
            weights = [shares[known] for known in everyday]
        self._cumulative = list(accumulate(weights))

    def draw(self, count: int, *, rng: random.Random) -> list[int]:
        """Positions of `count` cached rows."""
        return rng.choices(range(len(self._cumulative)), cum_weights=self._cumulative, k=count)
