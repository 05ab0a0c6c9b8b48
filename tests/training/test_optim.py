"""The optimiser orthogonalises, shares its work exactly, and counts samples."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from training.optim import NEWTON_SCHULZ, Optimizer, Schedule, is_inner_matrix, orthogonalised, world_size
from training.runs import Run, in_processes


def textbook_newton_schulz(matrix: Tensor) -> Tensor:
    """The published iteration, on the whole matrix."""
    a, b, c = NEWTON_SCHULZ
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(8, 40), (16, 16), (24, 100)])
def test_gram_iteration_equals_the_published_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalised(matrix), textbook_newton_schulz(matrix), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(12, 60), (60, 12)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalised(matrix))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


def test_rate_rises_stays_flat_and_falls_by_sample_count() -> None:
    schedule = Schedule(peak=1.0, warmup=100, decay_from=1000, decay_to=2000)
    rates = [schedule.rate(samples) for samples in (0, 49, 99, 999, 1500, 2000, 5000)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 1.0, 0.5, 0.0, 0.0])


def test_embeddings_and_outer_convolutions_are_left_to_adamw() -> None:
    matrix, vector = torch.zeros(4, 4), torch.zeros(4)
    assert is_inner_matrix("unet.mid_block.resnets.0.conv1.weight", matrix)
    assert not is_inner_matrix("unet.mid_block.resnets.0.conv1.bias", vector)
    assert not is_inner_matrix("unet.conv_in.weight", matrix)
    assert not is_inner_matrix("text.first.embeddings.position_embedding.weight", matrix)
    stem = "tower.vision_model.embeddings.patch_embedding.layers"
    convolution = torch.zeros(4, 4, 3, 3)
    assert is_inner_matrix(f"{stem}.3.weight", convolution)
    assert not is_inner_matrix(f"{stem}.0.weight", convolution)


def test_optimizer_fits_a_linear_map() -> None:
    torch.manual_seed(0)
    network, wanted, inputs = nn.Linear(6, 6), torch.randn(6, 6), torch.randn(64, 6)
    optimizer = Optimizer(network.named_parameters(), weight_decay=0.0)
    schedule = Schedule(0.05, warmup=1, decay_from=100, decay_to=200)
    for step in range(200):
        (network(inputs) - inputs @ wanted).square().mean().backward()
        optimizer.step(schedule.rate(step))
    assert (network(inputs) - inputs @ wanted).square().mean().item() < 0.01


def test_what_has_no_gradient_rests() -> None:
    """Muon's updates have full size whatever the gradient's, so a frozen step must not repeat the last one."""
    torch.manual_seed(0)
    network, inputs = nn.ModuleDict({"moved": nn.Linear(6, 6), "resting": nn.Linear(6, 6)}), torch.randn(8, 6)
    optimizer = Optimizer(network.named_parameters())
    for layer in network.values():
        layer(inputs).square().mean().backward()
    optimizer.step(0.01)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    network["moved"](inputs).square().mean().backward()
    optimizer.step(0.01)
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("resting")


def _train_halves(folder: Path, rows: int) -> None:
    """Each process takes its part of the rows."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    run = Run(folder / f"{world_size()}", network)
    inputs = torch.randn(rows, 5)
    count = world_size()
    part = slice(None) if count == 1 else slice(*((0, rows // 2), (rows // 2, rows))[torch.distributed.get_rank()])
    for _ in range(5):
        network(inputs[part]).square().mean().backward()
        run.finish_step(rows, 1e-2)
    run.save()


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    in_processes(1, _train_halves, tmp_path, 8)
    in_processes(2, _train_halves, tmp_path, 8)
    one, two = (torch.load(tmp_path / f"{count}" / "checkpoint.pt", weights_only=True) for count in (1, 2))
    for first, second in zip(one["weights"], two["weights"], strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
