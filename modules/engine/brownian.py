"""A Brownian path that depends on its seed alone, not on where or in which order it is asked."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Increment = NDArray[np.float32]

TOLERANCE_DIGITS = 6
REMEMBERED_NODES = 48


class _Node(NamedTuple):
    """The increment over [start, end], the key-th of the intervals after `depth` halvings."""

    key: int
    depth: int
    start: float
    end: float
    increment: Increment


class BrownianTree:
    """Increments of one Brownian path over a fixed interval, halved again and again (a Brownian bridge).

    Gives the same float32 numbers as `torchsde.BrownianTree(t0, w0, t1, entropy=seed)` of torchsde 0.2.6
    (Li et al. 2020, arXiv:2001.01328, algorithm 3) with its tolerance of 1e-6 and pool of 24, so that
    pictures of the stochastic samplers can be reproduced elsewhere; needs neither torchsde nor scipy.

    Args:
        start, end: the interval, start < end.
        shape: of one increment.
        seed: 0 to 2^64 - 1; the path is a function of it and the interval.
    """

    def __init__(self, start: float, end: float, shape: tuple[int, ...], seed: int) -> None:
        if not start < end:
            raise ValueError(f"A Brownian path needs an interval with start < end, not [{start}, {end}].")
        self._start, self._end = _rounded(start), _rounded(end)
        self._shape = shape
        self._seeds = _NodeSeeds(seed)
        self._generator = torch.Generator()
        self._nodes: OrderedDict[tuple[int, int], Increment] = OrderedDict()
        self._whole = self._randn(self._seeds.root) * np.float32(math.sqrt(end - start))

    def increment(self, a: float, b: float) -> Tensor:
        """B(b) - B(a), normal with variance b - a; times outside the interval count as its ends.

        Raises:
            ValueError: a > b.
        """
        if a > b:
            raise ValueError(f"An increment runs forward in time; {a} lies after {b}.")
        low, high = (min(max(_rounded(t), self._start), self._end) for t in (a, b))
        if low == high:
            return torch.zeros(self._shape)
        pieces: list[Increment] = []
        self._collect(pieces, _Node(0, 0, self._start, self._end, self._whole), low, high)
        total = pieces[0].copy()
        for piece in pieces[1:]:
            total += piece
        return torch.from_numpy(total)

    def _collect(self, pieces: list[Increment], node: _Node, a: float, b: float) -> None:
        """Append, in order, the increments of the dyadic pieces that make up [a, b] inside `node`."""
        while not (a == node.start and b == node.end):
            key, depth, start, end, increment = node
            middle = _rounded(0.5 * (end + start))
            left = self._left_increment(node, middle)
            if a < middle:
                node = _Node(2 * key, depth + 1, start, middle, left)
                if b <= middle:
                    continue
                self._collect(pieces, node, a, middle)
                a = middle
            node = _Node(2 * key + 1, depth + 1, middle, end, increment - left)
        pieces.append(node.increment)

    def _left_increment(self, node: _Node, middle: float) -> Increment:
        """Increment over [start, middle], given the one over [start, end]: a Brownian bridge's value."""
        key, depth, start, end, increment = node
        remembered = self._nodes.get((key, depth))
        if remembered is not None:
            self._nodes.move_to_end((key, depth))
            return remembered
        noise = self._randn(self._seeds.node(key, depth))
        # The order of these operations fixes the last bits; torchsde computes them like this.
        share = 1 / (end - start)
        left = increment * np.float32(middle - start)
        left *= np.float32(share)
        noise *= np.float32(math.sqrt((middle - start) * (end - middle) * share))
        left += noise
        self._nodes[(key, depth)] = left
        if len(self._nodes) > REMEMBERED_NODES:
            self._nodes.popitem(last=False)
        return left

    def _randn(self, seed: int) -> Increment:
        return torch.randn(self._shape, generator=self._generator.manual_seed(seed)).numpy()


class _NodeSeeds:
    """First word of `numpy.random.SeedSequence(seed, spawn_key=(key, depth), pool_size=24)` for many nodes.

    NumPy mixes the seed into a pool of 24 words, then the spawn key into every word. All nodes of a tree
    share the first and dearest part, and the first word of the result needs the first word of the pool only.
    """

    POOL_SIZE = 24
    WORD = 0xFFFFFFFF
    INIT_A, MULT_A = 0x43B0D7E5, 0x931E8875
    INIT_B, MULT_B = 0x8B51F9DD, 0x58F38DED
    MIX_L, MIX_R = 0xCA01F9DD, 0x4973F715

    def __init__(self, seed: int) -> None:
        sequence = np.random.SeedSequence(seed, pool_size=self.POOL_SIZE)
        self.root = int(sequence.generate_state(1)[0])
        self._pool_word = int(sequence.pool[0])
        hashed_before = self.POOL_SIZE + self.POOL_SIZE * (self.POOL_SIZE - 1)
        self._key_constant, self._depth_constant = (
            self.INIT_A * pow(self.MULT_A, hashed_before + word * self.POOL_SIZE, 1 << 32) & self.WORD
            for word in range(2)
        )

    def node(self, key: int, depth: int) -> int:
        """Seed of the node `key` (0 to 2^32 - 1), counted from the left, at `depth` halvings."""
        word = self._mixed(self._pool_word, key, self._key_constant)
        word = self._mixed(word, depth, self._depth_constant)
        return self._hashed(word, self.INIT_B, self.MULT_B)

    def _mixed(self, pool_word: int, value: int, constant: int) -> int:
        word = (self.MIX_L * pool_word - self.MIX_R * self._hashed(value, constant, self.MULT_A)) & self.WORD
        return word ^ (word >> 16)

    def _hashed(self, value: int, constant: int, multiplier: int) -> int:
        word = (value ^ constant) * (constant * multiplier & self.WORD) & self.WORD
        return word ^ (word >> 16)


def _rounded(time: float) -> float:
    return round(time, TOLERANCE_DIGITS)
