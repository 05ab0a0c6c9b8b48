"""The arithmetic of a change of models, and the network that converts latents."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modules.engine.latents import LatentStatistics
from modules.engine.refiner import (
    Interposer,
    ModelUse,
    coloured_noise,
    interposed,
    load_interposer,
    models_for_sd15,
    renoised_sigmas,
)
from modules.errors import ModelFileMissing, ModelFileUnusable


@pytest.mark.parametrize(
    ("strength", "use"),
    [
        (1.0, ModelUse.BOTH),
        (0.91, ModelUse.BOTH),
        (0.9, ModelUse.BASE),
        (0.562, ModelUse.BASE),  # ((30 - 15) / 30)^0.834 = 0.5610
        (0.560, ModelUse.REFINER),
        (0.1, ModelUse.REFINER),
    ],
)
def test_models_that_run_with_a_refiner_of_another_kind(strength: float, use: ModelUse) -> None:
    assert models_for_sd15(30, 15, strength) is use


def test_a_switch_at_the_end_leaves_everything_to_the_base() -> None:
    assert models_for_sd15(30, 30, 0.1) is ModelUse.BASE
    assert models_for_sd15(30, 40, 0.1) is ModelUse.BASE


def test_coloured_noise_takes_its_channel_mean_from_the_base() -> None:
    noise, predicted = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    mixed = coloured_noise(noise, predicted)
    assert torch.allclose(mixed.mean(1), predicted.mean(1), atol=1e-6)
    differences = mixed - mixed.mean(1, keepdim=True)
    assert torch.allclose(differences, noise - noise.mean(1, keepdim=True), atol=1e-6)


def test_levels_of_the_second_stage() -> None:
    assert renoised_sigmas(torch.tensor([8.0, 4.0, 2.0, 0.0]), 1).tolist() == pytest.approx([5.6, 2.8, 0.0])


def by_formula(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """The published network, written from its key names."""

    def conv(name: str, value: Tensor) -> Tensor:
        return torch.conv2d(value, weights[f"{name}.weight"], weights[f"{name}.bias"], padding=1)

    def norm(name: str, value: Tensor) -> Tensor:
        scale = weights[f"{name}.weight"] / (weights[f"{name}.running_var"] + 1e-5).sqrt()
        shift = weights[f"{name}.bias"] - weights[f"{name}.running_mean"] * scale
        return value * scale[:, None, None] + shift[:, None, None]

    def silu(value: Tensor) -> Tensor:
        return value * torch.sigmoid(value)

    def long(name: str, value: Tensor) -> Tensor:
        return conv(f"{name}.4", silu(conv(f"{name}.2", silu(conv(f"{name}.0", value)))))

    h = torch.relu(long("head.long", x) + conv("head.short", x))
    for block in range(1, 13):
        normed = norm(f"core.{block}.norm", h)
        h = torch.relu(long(f"core.{block}.long", normed) + normed)
    return conv("tail", silu(norm("core.13", h)))


@pytest.fixture(scope="module")
def interposer() -> Interposer:
    generator = torch.Generator().manual_seed(0)
    network = Interposer().eval()
    for name, value in network.state_dict().items():
        if name.endswith(("running_var", "norm.weight", "13.weight")):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    return network


def test_interposer_has_the_published_size(interposer: Interposer) -> None:
    assert sum(value.numel() for value in interposer.parameters()) == pytest.approx(1.41e6, rel=0.01)


def test_interposer_file_runs_as_its_keys_say(interposer: Interposer, tmp_path: Path) -> None:
    path = tmp_path / "interposer.safetensors"
    save_file(interposer.state_dict(), path)
    loaded = load_interposer(path)
    latents = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = loaded(latents)
    assert torch.allclose(found, by_formula(dict(interposer.state_dict()), latents), atol=1e-4, rtol=1e-4)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_conversion_goes_through_unscaled_latents(interposer: Interposer) -> None:
    base, refiner = LatentStatistics(0.13025), LatentStatistics(0.18215)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    found = interposed(interposer, base, refiner)(latents)
    with torch.no_grad():
        assert torch.allclose(found, interposer(latents / 0.13025) * 0.18215, atol=1e-4)
    found.add_(1.0)


def test_files_that_are_no_interposer_are_refused(interposer: Interposer, tmp_path: Path) -> None:
    with pytest.raises(ModelFileMissing):
        load_interposer(tmp_path / "absent.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, other)
    with pytest.raises(ModelFileUnusable, match="not the SDXL to SD 1"):
        load_interposer(other)
    weights = {**interposer.state_dict(), "tail.weight": torch.zeros(4, 64, 1, 1)}
    save_file(weights, other)
    with pytest.raises(ModelFileUnusable, match=r"'tail\.weight'"):
        load_interposer(other)
