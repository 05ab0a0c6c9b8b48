"""Packed weights give the same answers, and the network keeps no trace of them."""

import pytest
import torch
from torch import nn

from modules.engine import packed_convolutions
from modules.engine.packed_convolutions import PackedConvolutions, can_pack
from modules.engine.upsampling import fold_upsampling
from tests.engine.networks import POOLED_WIDTH, TEXT_WIDTH, tiny_unet


@pytest.fixture
def unet(monkeypatch):
    monkeypatch.setattr("modules.engine.upsampling.MIN_CHANNELS", 1)
    network = tiny_unet()
    fold_upsampling(network)
    return network


@pytest.fixture
def packed(monkeypatch) -> list[torch.Size]:
    """Input shapes for which weights were really packed."""
    shapes: list[torch.Size] = []
    original = packed_convolutions._Packed.__call__

    def noting(self, pixels):
        shapes.extend([pixels.shape] if pixels.shape not in self._packed else [])
        return original(self, pixels)

    monkeypatch.setattr(packed_convolutions._Packed, "__call__", noting)
    return shapes


@torch.inference_mode()
def forward(unet, *, rows: int = 2, size: tuple[int, int] = (8, 8), convolutions: PackedConvolutions | None = None):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 4, *size, generator=random)
    text = torch.randn(rows, 77, TEXT_WIDTH, generator=random)
    added = {"text_embeds": torch.zeros(rows, POOLED_WIDTH), "time_ids": torch.zeros(rows, 6)}

    def output() -> torch.Tensor:
        return unet(x, torch.tensor(500), text, added_cond_kwargs=added, return_dict=False)[0]

    if convolutions is None:
        return output()
    with convolutions.in_use():
        return output()


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (10, 6)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_answers_are_the_same_but_for_rounding(unet, packed, layout, size) -> None:
    unet.to(memory_format=layout)
    convolutions = PackedConvolutions(unet)
    for _ in range(2):
        answer = forward(unet, size=size, convolutions=convolutions)
        torch.testing.assert_close(answer, forward(unet, size=size), rtol=1e-4, atol=1e-5)
    assert bool(packed) == can_pack()


def test_weights_are_packed_once_for_a_shape(unet, packed) -> None:
    convolutions = PackedConvolutions(unet)
    forward(unet, convolutions=convolutions)
    count = len(packed)
    forward(unet, convolutions=convolutions)
    assert len(packed) == count
    forward(unet, rows=1, convolutions=convolutions)
    forward(unet, convolutions=convolutions)
    assert len(packed) == 2 * count


def test_the_network_keeps_no_trace(unet) -> None:
    class Interrupted(Exception):
        pass

    with pytest.raises(Interrupted), PackedConvolutions(unet).in_use():
        raise Interrupted
    assert not any("forward" in module.__dict__ for module in unet.modules())


def test_new_weights_count_from_the_next_one_on(unet) -> None:
    before = forward(unet, convolutions=PackedConvolutions(unet))
    with torch.no_grad():
        unet.conv_in.weight.mul_(2)
    after = forward(unet, convolutions=PackedConvolutions(unet))
    assert not torch.allclose(before, after, rtol=1e-2)
    torch.testing.assert_close(after, forward(unet), rtol=1e-4, atol=1e-5)


def test_large_networks_other_formats_and_replaced_layers_are_left_alone(unet, packed, monkeypatch) -> None:
    forward(unet, convolutions=PackedConvolutions(unet, memory_limit_bytes=1000))
    assert not packed
    half = nn.Sequential(nn.Conv2d(4, 4, 3)).to(torch.bfloat16)
    replaced = nn.Conv2d(4, 4, 3)
    replaced.__dict__["forward"] = replaced.forward
    same = nn.Conv2d(4, 4, 3, padding="same")
    assert packed_convolutions.packable_layers(nn.Sequential(half, replaced, same)) == []
    monkeypatch.setattr(packed_convolutions, "can_pack", lambda: False)
    forward(unet, convolutions=PackedConvolutions(unet))
    assert not packed
