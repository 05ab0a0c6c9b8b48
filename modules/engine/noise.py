"""Random numbers of a run: each row of a batch has streams of its own, so it equals its single picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from modules.engine.brownian import BrownianTree

INPAINT_SEED_MODULUS = 2**63 - 1


class RowNoise:
    """Noise of a batch in which every row is seeded apart.

    Everything is drawn on the CPU, so results do not depend on the device. `normal` continues one stream
    per row: the first call gives the initial noise, later calls the noise that ancestral samplers add.

    Args:
        seeds: one per row, 0 to 2^64 - 1.
        shape: of one row, (4, h, w).
        device: where the noise is used.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        if not seeds:
            raise ValueError("Noise needs at least one seed.")
        self.seeds = tuple(seeds)
        self.shape = tuple(shape)
        self.device = torch.device(device)
        self._generators = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        self._paths: _RowPaths | None = None

    def normal(self) -> Tensor:
        """The next N(0, 1) noise of each row's stream: (B, 4, h, w) float32."""
        return _drawn(self._generators, self.shape, self.device)

    def span(self, sigma_min: float, sigma_max: float) -> None:
        """Set the noise levels of a whole run, over which the rows' Brownian paths go.

        Args:
            sigma_min: smallest positive level of the schedule.
            sigma_max: largest level of the schedule; both stages of a refiner swap share it.
        """
        self._paths = _RowPaths(sigma_min, sigma_max, self.shape, self.seeds)

    def brownian(self, sigma: float, sigma_next: float) -> Tensor:
        """W(σ, σ_next): the paths' movement between two levels, scaled to variance 1.

        The sign follows from sorting the interval: falling levels give (B(σ_next) - B(σ)) / sqrt(σ - σ_next).

        Returns:
            (B, 4, h, w) float32; equal arguments give equal noise, whatever was asked before.
        Raises:
            RuntimeError: `span` was not called.
            ValueError: both levels are the same.
        """
        if self._paths is None:
            raise RuntimeError("Call span(sigma_min, sigma_max) before asking for Brownian noise.")
        if sigma == sigma_next:
            raise ValueError(f"Brownian noise between {sigma} and itself has no variance.")
        low, high = min(sigma, sigma_next), max(sigma, sigma_next)
        scale = (-1.0 if sigma > sigma_next else 1.0) / math.sqrt(high - low)
        return torch.stack([tree.increment(low, high) for tree in self._paths.trees]).mul_(scale).to(self.device)

    def next_seeds(self) -> RowNoise:
        """Streams seeded one higher, along the same Brownian paths: for a stage that starts from noise again."""
        following = RowNoise([seed + 1 for seed in self.seeds], self.shape, self.device)
        following._paths = self._paths
        return following


@dataclass(frozen=True)
class _RowPaths:
    """One Brownian path per row, begun when first asked: most samplers never do."""

    sigma_min: float
    sigma_max: float
    shape: tuple[int, ...]
    seeds: tuple[int, ...]

    @cached_property
    def trees(self) -> tuple[BrownianTree, ...]:
        return tuple(BrownianTree(self.sigma_min, self.sigma_max, self.shape, seed) for seed in self.seeds)


class InpaintNoise:
    """Noise put on the kept part of a picture at every model evaluation.

    Each row draws from a stream seeded (seed + 1) mod (2^63 - 1), apart from the sampler's own; a new
    sampler run starts a new one.

    Args:
        seeds, shape, device: as for `RowNoise`, of that sampler run.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self._shape, self._device = tuple(shape), torch.device(device)
        self._generators = [torch.Generator().manual_seed((seed + 1) % INPAINT_SEED_MODULUS) for seed in seeds]

    def normal(self) -> Tensor:
        """The next N(0, 1) noise of each row: (B, 4, h, w) float32."""
        return _drawn(self._generators, self._shape, self._device)


def _drawn(generators: Sequence[torch.Generator], shape: tuple[int, ...], device: torch.device) -> Tensor:
    rows = [torch.randn((1, *shape), generator=generator) for generator in generators]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).to(device)
