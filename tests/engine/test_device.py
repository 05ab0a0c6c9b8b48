"""The policy picks formats that a device computes fast and a model survives."""

import pytest
import torch

from modules.engine import device
from modules.engine.device import choose_policy


def test_plain_cpu_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: False)

    policy = choose_policy("cpu")

    assert {policy.unet, policy.text, policy.vae} == {torch.float32}
    assert not policy.channels_last


def test_cpu_with_bf16_uses_it_for_large_unets_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: True)

    policy = choose_policy("cpu")

    assert policy.unet_for(2_600_000_000) == torch.bfloat16
    assert policy.unet_for(17_000_000) == torch.float32
    assert (policy.text, policy.vae) == (torch.float32, torch.float32)
    assert policy.channels_last


def test_asked_precision_holds_for_every_size() -> None:
    assert choose_policy("cpu", precision="bf16").unet_for(1) == torch.bfloat16
    assert choose_policy("cpu", precision="fp32").unet_for(10**10) == torch.float32


def test_fp16_on_a_cpu_becomes_bf16() -> None:
    assert choose_policy("cpu", precision="fp16").unet == torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "unet", "vae"), [((7, 5), torch.float16, torch.float32), ((8, 6), torch.bfloat16, torch.bfloat16)]
)
def test_cuda_cards_get_the_half_precision_they_are_fast_in(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], unet: torch.dtype, vae: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    policy = choose_policy("cuda")

    assert (policy.unet, policy.text, policy.vae) == (unet, unet, vae)


def test_vae_precision_is_its_own_choice() -> None:
    assert choose_policy("cpu", precision="bf16").vae == torch.float32
    assert choose_policy("cpu", vae_precision="bf16").vae == torch.bfloat16


def test_text_encoders_stay_in_float32_on_a_cpu_unless_asked() -> None:
    assert choose_policy("cpu", precision="bf16").text == torch.float32
    assert choose_policy("cpu", text_precision="bf16").text == torch.bfloat16
