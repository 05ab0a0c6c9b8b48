"""The policy picks formats that a device computes fast and a model survives."""

import pytest
import torch

from modules.engine import device
from modules.engine.device import choose_policy
from modules.engine.formats import NumberFormat
from modules.engine.runtime import use_threads

LARGE, SMALL = 2_600_000_000, 17_000_000
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture(params=[False, True], ids=["plain", "with bf16"])
def has_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the CPU has instructions for bfloat16; both are tried."""
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: request.param)
    return bool(request.param)


def test_a_plain_cpu_keeps_large_networks_as_in_their_file_and_computes_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: False)

    policy = choose_policy("cpu")

    for chosen in (policy.unet_for(LARGE), policy.text_for(LARGE)):
        assert chosen.computed == F32
        assert [chosen.stored_as(in_file) for in_file in (F16, BF16, F32, torch.float64)] == [F16, BF16, F32, F32]
    assert policy.vae == NumberFormat.plain(F32)


def test_small_networks_are_float32_on_every_cpu(has_bf16: bool) -> None:
    policy = choose_policy("cpu")

    assert policy.unet_for(SMALL) == policy.text_for(SMALL) == NumberFormat.plain(F32)


def test_cpu_with_bf16_computes_large_unets_in_it_and_texts_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: True)

    policy = choose_policy("cpu")

    assert policy.unet_for(LARGE) == NumberFormat.plain(BF16)
    assert (policy.text_for(LARGE).computed, policy.vae.computed) == (F32, F32)


@pytest.mark.parametrize("parameters", [SMALL, LARGE])
def test_asked_precision_holds_for_every_size(has_bf16: bool, parameters: int) -> None:
    half, whole = choose_policy("cpu", precision="bf16"), choose_policy("cpu", precision="fp32")

    assert half.unet_for(parameters) == NumberFormat(computed=BF16 if has_bf16 else F32, stored=BF16)
    assert whole.unet_for(parameters) == NumberFormat.plain(F32)


def test_no_cpu_computes_in_fp16(has_bf16: bool) -> None:
    policy = choose_policy("cpu", precision="fp16", text_precision="fp16", vae_precision="fp16")

    expected = NumberFormat.plain(BF16) if has_bf16 else NumberFormat(computed=F32, stored=F16)
    assert {policy.unet_for(SMALL), policy.text_for(SMALL), policy.vae} == {expected}


@pytest.mark.parametrize(("capability", "unet", "vae"), [((7, 5), F16, F32), ((8, 6), BF16, BF16)])
def test_cuda_cards_get_the_half_precision_they_are_fast_in(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], unet: torch.dtype, vae: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    policy = choose_policy("cuda")

    assert policy.unet_for(SMALL) == policy.text_for(SMALL) == NumberFormat.plain(unet)
    assert policy.vae == NumberFormat.plain(vae)


def test_each_precision_is_a_choice_of_its_own(has_bf16: bool) -> None:
    assert choose_policy("cpu", precision="bf16").vae == NumberFormat.plain(F32)
    assert choose_policy("cpu", precision="bf16").text_for(SMALL) == NumberFormat.plain(F32)
    assert choose_policy("cpu", vae_precision="bf16").vae.stored == BF16
    assert choose_policy("cpu", text_precision="bf16").text_for(SMALL).stored == BF16
    assert choose_policy("cpu", text_precision="bf16").unet_for(SMALL) == NumberFormat.plain(F32)


@pytest.mark.parametrize(("wish", "stored"), [("auto", F32), ("fp16", F16)])
def test_a_vae_on_the_cpu_beside_a_gpu_is_computed_in_float32(
    monkeypatch: pytest.MonkeyPatch, wish: device.Precision, stored: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: False)

    policy = choose_policy("cuda", vae_precision=wish, vae_on_cpu=True)

    assert (policy.device.type, policy.vae_device.type) == ("cuda", "cpu")
    assert policy.vae == NumberFormat(computed=F32, stored=stored)
    assert policy.unet == NumberFormat.plain(BF16)


def test_everything_is_on_one_device_unless_asked() -> None:
    assert choose_policy("cpu").vae_device == torch.device("cpu")
    assert choose_policy("mps").vae_device == torch.device("mps")


def test_threads_are_as_many_as_asked() -> None:
    before = torch.get_num_threads()
    try:
        use_threads(3)
        use_threads(0)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
