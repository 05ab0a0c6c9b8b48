"""FreeU follows its definition, is neutral at 1 and leaves no trace."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from modules.engine.freeu import freeu, strengthened, without_low_frequencies
from tests.engine.networks import CallUNet, tiny_unet


@dataclass(frozen=True)
class Factors:
    b1: float = 1.01
    b2: float = 1.02
    s1: float = 0.99
    s2: float = 0.95


def fourier_filter(x: Tensor, scale: float) -> Tensor:
    """The published form: central 2×2 bins of the shifted spectrum scaled, real part."""
    spectrum = torch.fft.fftshift(torch.fft.fftn(x.float(), dim=(-2, -1)), dim=(-2, -1))
    height, width = x.shape[-2:]
    spectrum[..., height // 2 - 1 : height // 2 + 1, width // 2 - 1 : width // 2 + 1] *= scale
    return torch.fft.ifftn(torch.fft.ifftshift(spectrum, dim=(-2, -1)), dim=(-2, -1)).real.to(x.dtype)


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (2, 3), (22, 18), (1, 8)], ids=str)
@pytest.mark.parametrize("factor", [0.0, 0.95, 1.3])
def test_low_frequencies_equal_the_fourier_filter(size: tuple[int, int], factor: float) -> None:
    skip = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(without_low_frequencies(skip, factor), fourier_filter(skip, factor), atol=2e-6)


def test_low_frequencies_keep_the_number_format() -> None:
    skip = torch.randn(1, 3, 8, 8).bfloat16()
    assert without_low_frequencies(skip, 0.5).dtype == torch.bfloat16


def test_strengthened_follows_its_definition() -> None:
    features = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(1))
    found = strengthened(features, 1.4)
    for image in range(2):
        mean = features[image].mean(0)
        weight = (mean - mean.min()) / (mean.max() - mean.min())
        assert torch.allclose(found[image, :3], features[image, :3] * (0.4 * weight + 1), atol=1e-6)
        assert found[image, 3:].equal(features[image, 3:])


def test_constant_features_stay_finite() -> None:
    assert strengthened(torch.ones(1, 4, 8, 8), 1.4).equal(torch.ones(1, 4, 8, 8))


def test_factors_of_one_give_the_input_itself() -> None:
    features = torch.randn(1, 4, 8, 8)
    assert strengthened(features, 1.0) is features
    assert without_low_frequencies(features, 1.0) is features


@pytest.fixture(scope="module")
def call() -> CallUNet:
    return CallUNet(tiny_unet())


def test_it_acts_on_the_network(call: CallUNet) -> None:
    plain = call()
    with freeu(call.unet, Factors()):
        assert not torch.allclose(call(), plain)


def test_neutral_factors_change_nothing(call: CallUNet) -> None:
    plain = call()
    with freeu(call.unet, Factors(1.0, 1.0, 1.0, 1.0)):
        assert call().equal(plain)
        assert not any(module._forward_pre_hooks for module in call.unet.modules())


def test_undo_restores(call: CallUNet) -> None:
    plain = call()
    weights = {name: value.clone() for name, value in call.unet.state_dict().items()}
    with pytest.raises(KeyError), freeu(call.unet, Factors()):
        raise KeyError
    assert call().equal(plain)
    assert not any(module._forward_pre_hooks for module in call.unet.modules())
    assert all(value.equal(weights[name]) for name, value in call.unet.state_dict().items())


@pytest.mark.parametrize(
    ("factors", "layers"),
    [
        (Factors(1.5, 1.0, 1.0, 1.0), {"0.0", "0.1", "0.2", "1.0"}),
        (Factors(1.0, 1.0, 0.5, 1.0), {"0.0", "0.1", "0.2", "1.0"}),
        (Factors(1.0, 1.5, 1.0, 1.0), {"1.1", "1.2", "2.0"}),
        (Factors(1.0, 1.0, 1.0, 0.5), {"1.1", "1.2", "2.0"}),
    ],
    ids=["b1", "s1", "b2", "s2"],
)
def test_width_classes_of_sdxl(call: CallUNet, factors: Factors, layers: set[str]) -> None:
    with freeu(call.unet, factors):
        hooked = {
            f"{i}.{j}"
            for i, block in enumerate(call.unet.up_blocks)
            for j, resnet in enumerate(block.resnets)
            if resnet._forward_pre_hooks
        }
    assert hooked == layers


def test_widths_are_the_two_largest_of_any_network() -> None:
    unet = tiny_unet(widths=(16, 32, 48))
    with freeu(unet, Factors()):
        hooked = sum(1 for module in unet.modules() if module._forward_pre_hooks)
    assert hooked == 7


def test_equals_a_network_that_does_it_inside(call: CallUNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the same arithmetic put where up blocks join their features."""
    factors = Factors(1.3, 1.4, 0.9, 0.2)
    first = call.unet.config.block_out_channels[0]
    by_width = {4 * first: (factors.b1, factors.s1), 2 * first: (factors.b2, factors.s2)}
    real_cat, joins = torch.cat, []

    def joining(tensors, dim: int = 0) -> Tensor:
        if dim == 1 and len(tensors) == 2 and tensors[0].ndim == 4:
            joins.append(tensors[0].shape[1])
            b, s = by_width.get(tensors[0].shape[1], (1.0, 1.0))
            if (b, s) != (1.0, 1.0):
                h, skip = tensors[0].clone(), tensors[1]
                mean = h.mean(1, keepdim=True)
                low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
                h[:, : h.shape[1] // 2] *= (b - 1) * (mean - low) / (high - low) + 1
                return real_cat([h, fourier_filter(skip, s)], dim=1)
        return real_cat(tensors, dim=dim)

    with freeu(call.unet, factors):
        hooked = call()
    monkeypatch.setattr(torch, "cat", joining)
    inside = call()
    assert len(joins) == 9
    assert torch.allclose(hooked, inside, atol=2e-6)
