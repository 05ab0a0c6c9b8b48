"""Folded upsampling computes what diffusers' layer computes, and stands aside where that is not float32 on a CPU."""

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from modules.engine.device import choose_policy
from modules.engine.formats import widen_in_use
from modules.engine.store import ModelStore
from modules.engine.upsampling import MIN_CHANNELS, fold_upsampling, upsample_and_convolve
from tests.tiny_sdxl import write_tiny

WIDE = MIN_CHANNELS


def pair(channels: int = WIDE, out_channels: int | None = None) -> tuple[nn.Module, nn.Module]:
    """diffusers' layer, and one with the same weights that is folded."""
    torch.manual_seed(0)
    plain = Upsample2D(channels, use_conv=True, out_channels=out_channels)
    folded = Upsample2D(channels, use_conv=True, out_channels=out_channels)
    folded.load_state_dict(plain.state_dict())
    fold_upsampling(folded)
    return plain, folded


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(2, 2), (1, 5), (6, 4), (7, 7)])
@pytest.mark.parametrize("out_channels", [None, 2 * WIDE])
@torch.inference_mode()
def test_equals_the_layer_of_diffusers(size, layout, out_channels):
    plain, folded = pair(out_channels=out_channels)
    pixels = torch.randn(2, WIDE, *size).contiguous(memory_format=layout)
    expected, output = plain(pixels), folded(pixels)
    assert type(folded) is not type(plain)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert output.is_contiguous(memory_format=layout)


@torch.inference_mode()
def test_a_convolution_without_bias():
    weight, pixels = torch.randn(3, 2, 3, 3), torch.randn(1, 2, 4, 5)
    repeated = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = nn.functional.conv2d(repeated, weight, padding=1)
    torch.testing.assert_close(upsample_and_convolve(pixels, weight, None), expected, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_what_is_not_float32_or_not_doubled_is_left_to_diffusers():
    plain, folded = pair()
    pixels = torch.randn(1, WIDE, 3, 3)
    assert torch.equal(folded(pixels, output_size=(5, 7)), plain(pixels, output_size=(5, 7)))
    plain.bfloat16()
    folded.bfloat16()
    assert torch.equal(folded(pixels.bfloat16()), plain(pixels.bfloat16()))


@pytest.mark.parametrize(
    "layer",
    [
        Upsample2D(WIDE // 2, use_conv=True),
        Upsample2D(WIDE, use_conv=False),
        Upsample2D(WIDE, use_conv_transpose=True),
        Upsample2D(WIDE, use_conv=True, name="other"),
        Upsample2D(WIDE, use_conv=True, norm_type="ln_norm"),
        Upsample2D(WIDE, use_conv=True, kernel_size=1, padding=0),
        Upsample2D(WIDE, use_conv=True, interpolate=False),
    ],
)
def test_other_layers_stay_as_they_are(layer: nn.Module):
    fold_upsampling(layer)
    assert type(layer) is Upsample2D


@torch.inference_mode()
def test_weights_kept_in_half_are_widened_and_changed_ones_count():
    plain, folded = pair()
    pixels = torch.randn(1, WIDE, 3, 3)
    for layer in (plain, folded):
        layer.get_parameter("conv.weight").data = layer.get_parameter("conv.weight").bfloat16()
    widen_in_use(folded, torch.float32)
    plain.float()
    torch.testing.assert_close(folded(pixels), plain(pixels), rtol=1e-4, atol=1e-5)
    folded.get_parameter("conv.weight").mul_(2)  # as a LoRA does
    plain.get_parameter("conv.weight").mul_(2)
    torch.testing.assert_close(folded(pixels), plain(pixels), rtol=1e-4, atol=1e-5)


def test_the_store_folds_what_it_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("modules.engine.upsampling.MIN_CHANNELS", 1)
    model = ModelStore(choose_policy("cpu")).base(write_tiny(tmp_path / "tiny.safetensors"))
    for network in (model.unet, model.vae):
        kinds = {type(module).__name__ for module in network.modules() if isinstance(module, Upsample2D)}
        assert kinds == {"_FoldedUpsample2D"}
