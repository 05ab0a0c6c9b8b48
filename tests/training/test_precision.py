"""bfloat16 training keeps float32 masters, and its own group normalisation equals PyTorch's."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from training.precision import (
    FusedGroupNorm,
    compiled_operator,
    drop_stale_lock,
    measured_dtype,
    prepare,
    training_step_seconds,
    use_fused_norms,
)
from training.runs import Run


def test_format_is_chosen_by_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    assert training_step_seconds(torch.float32, repeats=1) > 0
    for gain, chosen in ((1.2, torch.float32), (4.0, torch.bfloat16)):
        seconds = {torch.float32: gain, torch.bfloat16: 1.0}
        monkeypatch.setattr("training.precision.training_step_seconds", seconds.__getitem__)
        assert measured_dtype() == chosen


def test_norms_are_swapped_in_place() -> None:
    network = nn.Sequential(nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8))
    before = network.state_dict()
    use_fused_norms(network)
    assert isinstance(network[1], FusedGroupNorm)
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


def test_float32_norm_is_pytorchs_own() -> None:
    pixels, norm = torch.randn(2, 8, 4, 4), nn.GroupNorm(2, 8)
    expected = norm(pixels)
    use_fused_norms(norm)
    assert torch.equal(norm(pixels), expected)


def test_only_the_lock_of_a_dead_compilation_is_dropped(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    drop_stale_lock(lock)
    lock.touch()
    drop_stale_lock(lock)
    assert lock.exists()
    os.utime(lock, (0, 0))
    drop_stale_lock(lock)
    assert not lock.exists()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 16, 5, 7), (2, 16, 9)])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compiled_norm_equals_pytorchs_forward_and_backward(shape: tuple[int, ...]) -> None:
    if compiled_operator() is None:
        pytest.skip("no C++ compiler")
    generator = torch.Generator().manual_seed(0)
    reference = nn.GroupNorm(4, 16)
    with torch.no_grad():
        reference.weight.copy_(torch.randn(16, generator=generator))
        reference.bias.copy_(torch.randn(16, generator=generator))
    ours = nn.GroupNorm(4, 16)
    ours.load_state_dict(reference.state_dict())
    ours.bfloat16()
    use_fused_norms(ours)
    values = (2 * torch.randn(shape, generator=generator) + 0.5).bfloat16()
    upstream = torch.randn(shape, generator=generator).bfloat16()
    one, other = values.float().requires_grad_(), values.clone().requires_grad_()
    reference(one).backward(upstream.float())
    output = ours(other)
    output.backward(upstream)
    assert output.shape == shape
    torch.testing.assert_close(output.float(), reference(one), rtol=2e-2, atol=3e-2)
    assert one.grad is not None
    assert other.grad is not None
    torch.testing.assert_close(other.grad.float(), one.grad, rtol=3e-2, atol=3e-2)
    for name in ("weight", "bias"):
        mine, theirs = getattr(ours, name).grad, getattr(reference, name).grad
        torch.testing.assert_close(mine.float(), theirs, rtol=2e-2, atol=0.1)


def test_small_steps_add_up_in_the_masters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Linear(4, 4)
    prepare(network, torch.bfloat16)
    run = Run(tmp_path, network, muon_ratio=None)
    first = run.parameters[0].detach().clone()
    for _ in range(20):
        network(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        run.finish_step(1, 1e-5)  # far below bfloat16's resolution
    assert network.weight.dtype == torch.bfloat16
    assert run.parameters[0].dtype == torch.float32
    assert float((run.parameters[0].detach() - first).abs().min()) > 1e-5 * 1e-3
    assert torch.equal(network.weight, run.parameters[0].bfloat16())


def test_checkpoint_passes_between_formats(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide, narrow = nn.Linear(4, 4), nn.Linear(4, 4).bfloat16()
    Run(tmp_path, wide).save()
    run = Run(tmp_path, narrow)
    run.load()
    assert torch.equal(run.parameters[0], wide.weight)
    assert torch.equal(narrow.weight, wide.weight.bfloat16())
