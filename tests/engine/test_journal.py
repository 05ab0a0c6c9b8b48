"""Replaying a model's estimates: the same picture, fewer evaluations, whatever the file holds."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from modules.engine.journal import DenoisedJournal

SHAPE = (2, 4, 3, 5)


class Counting:
    """A toy model that counts its evaluations."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        self.calls += 1
        return torch.tanh(x / (1 + sigma))


def attempt(folder: Path, model: Counting, steps: int, identity: str = "a run") -> tuple[Tensor, int]:
    """A few steps of a made-up sampler that remembers its last estimate; its latents, and how many were replayed."""
    path = folder / "sub" / "t-0.denoised"
    with DenoisedJournal(path, identity=identity, shape=SHAPE) as journal:
        denoise = journal.wrap(model)
        x, last = torch.linspace(-3, 3, 2 * 4 * 3 * 5).reshape(SHAPE), torch.zeros(SHAPE)
        for step in range(steps):
            denoised = denoise(x, 10.0 / (step + 1))
            x = x + 0.3 * (denoised - x) + 0.1 * (denoised - last)
            last = denoised
        return x, journal.replayed


def test_a_run_cut_short_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    undisturbed, _ = attempt(tmp_path, Counting(), 10, "undisturbed")
    attempt(tmp_path, Counting(), 6)
    model = Counting()
    latents, replayed = attempt(tmp_path, model, 10)
    assert (replayed, model.calls) == (6, 4)
    assert torch.equal(latents, undisturbed)


@pytest.mark.parametrize("cut", [1, 7, 3 * 4 * 5, 500])
def test_a_torn_end_costs_only_the_torn_estimates(tmp_path: Path, cut: int) -> None:
    expected, _ = attempt(tmp_path, Counting(), 8)
    path = tmp_path / "sub" / "t-0.denoised"
    path.write_bytes(path.read_bytes()[:-cut])
    latents, replayed = attempt(tmp_path, Counting(), 8)
    assert 0 < replayed < 8
    assert torch.equal(latents, expected)


def test_a_damaged_estimate_is_not_used(tmp_path: Path) -> None:
    attempt(tmp_path, Counting(), 8)
    path = tmp_path / "sub" / "t-0.denoised"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert attempt(tmp_path, Counting(), 8)[1] < 8


def test_another_run_begins_anew(tmp_path: Path) -> None:
    attempt(tmp_path, Counting(), 5)
    assert attempt(tmp_path, Counting(), 5, "another seed")[1] == 0


def test_a_finished_run_leaves_nothing(tmp_path: Path) -> None:
    journal = DenoisedJournal(tmp_path / "t-0.denoised", identity="a run", shape=SHAPE)
    journal.discard()
    assert list(tmp_path.iterdir()) == []
