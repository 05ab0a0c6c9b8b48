"""A run that is cut and resumed ends where an uncut one does."""

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from training.runs import Run, averaged_weights


def new_run(folder: Path, *, minutes: float = float("inf")) -> Run:
    torch.manual_seed(0)
    return Run(folder, nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), minutes=minutes)


def train(run: Run, until: int) -> None:
    """Steps of eight samples; the data depend on the sample count only."""
    while run.going(until):
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(run.samples))
        run.network(inputs).square().mean().backward()
        run.finish_step(8, 1e-2)


def test_resumed_run_ends_where_an_uncut_one_does(tmp_path: Path) -> None:
    whole = new_run(tmp_path / "whole")
    train(whole, 80)
    part = new_run(tmp_path / "part")
    train(part, 40)
    part.save()
    resumed = new_run(tmp_path / "part")
    resumed.load()
    assert resumed.samples == 40
    train(resumed, 80)
    for one, other in zip(whole.parameters, resumed.parameters, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(whole.average.values, resumed.average.values, strict=True):
        assert torch.equal(one, other)


def test_sigterm_ends_the_run_after_the_step(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        run.stop_on_signals()
        assert run.going()
        os.kill(os.getpid(), signal.SIGTERM)
        assert not run.going()
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_run_ends_after_its_minutes(tmp_path: Path) -> None:
    assert not new_run(tmp_path, minutes=0).going()


def test_average_is_applied_and_taken_back(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    train(run, 40)
    kept = [parameter.detach().clone() for parameter in run.parameters]
    with run.average.applied():
        assert not torch.equal(run.parameters[0], kept[0])
        assert torch.equal(run.parameters[0], run.average.values[0])
    assert all(torch.equal(one, other) for one, other in zip(run.parameters, kept, strict=True))


def test_frozen_weights_are_not_stored(tmp_path: Path) -> None:
    network = nn.ModuleDict({"frozen": nn.Linear(3, 3).requires_grad_(False), "trained": nn.Linear(3, 3)})
    run = Run(tmp_path, network)
    run.save()
    assert set(averaged_weights(run.file)) == {"trained.weight", "trained.bias"}


def test_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    new_run(tmp_path).save()
    other = Run(tmp_path, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="another network"):
        other.load()
