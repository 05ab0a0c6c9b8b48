"""Adapters start as nothing, can be switched off exactly, and come out as a LoRA that the engine merges alike."""

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from modules.engine.device import choose_policy
from modules.engine.loras import LoraChoice, LoraStack
from modules.engine.store import ModelStore
from modules.engine.tensorfile import open_tensor_file
from tests.training.conftest import EMBEDDED, VOCABULARY
from training import few_step_lora, style_lora
from training.art import ArtSet
from training.checkpoints import read_network
from training.few_step_lora import ConsistencyTrainer, boundary, clean_estimate, draw_steps
from training.lora import LowRank, adapt, kohya_tensors, save_lora, switched_off
from training.prompts import native_time_ids
from training.stages import StateFolder
from training.style_lora import pixel_art, styled_bucket
from training.unet import NoiseTrainer, TextPlan


@pytest.fixture
def network() -> nn.ModuleDict:
    return read_network(EMBEDDED, VOCABULARY).requires_grad_(False).eval()


@torch.inference_mode()
def predicted(unet: nn.Module) -> Tensor:
    """The noise it predicts for fixed inputs."""
    generator = torch.Generator().manual_seed(0)
    latents, hidden = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 77, 320, generator=generator)
    conditions = {"text_embeds": torch.randn(1, 192, generator=generator), "time_ids": native_time_ids(1)}
    noise: Tensor = unet(latents, torch.tensor([500]), hidden, added_cond_kwargs=conditions).sample
    return noise


def disturb(adapters: dict[str, LowRank]) -> None:
    """Give every adapter a change that shows."""
    generator = torch.Generator().manual_seed(1)
    for adapter in adapters.values():
        adapter.up.data.copy_(0.02 * torch.randn(adapter.up.shape, generator=generator))


def test_fresh_adapters_change_nothing(network: nn.ModuleDict) -> None:
    before = predicted(network["unet"])
    adapt(network["unet"], rank=4)
    assert torch.equal(predicted(network["unet"]), before)


def test_adapters_are_all_that_is_trained(network: nn.ModuleDict) -> None:
    adapters = adapt(network["unet"], rank=4)
    trained = {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
    assert trained == {id(p) for adapter in adapters.values() for p in (adapter.up, adapter.down)}


def test_switched_off_adapters_leave_the_teacher_as_it_was(network: nn.ModuleDict) -> None:
    before = predicted(network["unet"])
    adapters = adapt(network["unet"], rank=4)
    disturb(adapters)
    with switched_off(adapters):
        assert torch.equal(predicted(network["unet"]), before)
    assert not torch.allclose(predicted(network["unet"]), before, atol=1e-3)


def test_engine_merges_the_written_lora_into_the_same_network(network: nn.ModuleDict, tmp_path: Path) -> None:
    adapters = adapt(network["unet"], rank=4, alpha=2)
    disturb(adapters)
    file = tmp_path / "lora.safetensors"
    tensors = kohya_tensors(adapters, network["unet"], open_tensor_file(EMBEDDED).shapes)
    save_lora(tensors, file, title="test", rank=4)
    assert len(tensors) == 3 * len(adapters)
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight" in tensors
    model = ModelStore(choose_policy("cpu", precision="fp32")).base(EMBEDDED)
    stack: LoraStack = model.loras
    with stack.merged([LoraChoice(file, 1.0)]) as reports:
        merged = predicted(model.unet)
    assert not [report for report in reports if report.unmatched]
    torch.testing.assert_close(merged, predicted(network["unet"]), rtol=1e-2, atol=5e-3)


def test_pixel_art_has_flat_cells_and_few_levels() -> None:
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    styled = pixel_art(pixels)
    assert styled.shape == pixels.shape
    cells = styled.unfold(2, 8, 8).unfold(3, 8, 8).flatten(4)
    assert torch.equal(cells.min(-1).values, cells.max(-1).values)
    assert len(styled.unique()) <= 5


def test_style_captions_end_in_the_trigger(art: ArtSet, network: nn.ModuleDict) -> None:
    rng = random.Random(0)
    bucket = styled_bucket(EMBEDDED, art, art.pick(limit=2), batch=2, size_px=64, rng=rng)
    trainer = NoiseTrainer(network, art, shared=rng, own=rng, suffix="pixel art")
    captions = [trainer._caption(bucket, 0, TextPlan(77, 0, False)) for _ in range(100)]
    named = [text for text in captions if text.endswith(", pixel art")]
    assert 75 < len(named) < 100


def test_teacher_step_starts_on_the_distilled_grid() -> None:
    torch.manual_seed(0)
    step = draw_steps(2000)
    assert set(step.start.tolist()) == set(range(19, 1000, 20))
    assert int(step.end.min()) == -1
    assert torch.equal(step.start - step.end, torch.full_like(step.start, 20))


def test_boundary_keeps_a_clean_picture_and_trusts_the_network_elsewhere() -> None:
    keep, take = boundary(torch.tensor([-1, 0, 19, 999]))
    torch.testing.assert_close(keep[:2].flatten(), torch.ones(2))
    torch.testing.assert_close(take[:2].flatten(), torch.zeros(2))
    torch.testing.assert_close(take[2:].flatten(), torch.ones(2), rtol=0, atol=1e-4)


def test_clean_estimate_undoes_the_noising() -> None:
    latents, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    signal = torch.tensor([0.9, 0.1]).view(2, 1, 1, 1)
    noisy = signal.sqrt() * latents + (1 - signal).sqrt() * noise
    torch.testing.assert_close(clean_estimate(noisy, noise, signal), latents, rtol=1e-3, atol=1e-3)


def test_consistency_loss_teaches_the_adapters_only(network: nn.ModuleDict) -> None:
    adapters = adapt(network["unet"], rank=2)
    disturb(adapters)
    trainer = ConsistencyTrainer(network["unet"], network["text"], adapters)
    loss = trainer.loss(torch.randn(2, 4, 8, 8), ["a red apple", "a rocket"])
    loss.backward()
    assert loss.item() > 0
    assert all(adapter.up.grad is not None and adapter.up.grad.abs().sum() > 0 for adapter in adapters.values())


@pytest.mark.slow
@pytest.mark.parametrize("module", [style_lora, few_step_lora])
def test_lora_stage_writes_a_file(
    module: object, state: StateFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "lora.safetensors"
    options = ["--state", state.root, "--weights", EMBEDDED, "--vocabulary", VOCABULARY, "--target", target]
    options += ["--samples", 4, "--batch", 2, "--rank", 2, "--concepts", 2]
    options += ["--size", 64] if module is style_lora else []
    monkeypatch.setattr("sys.argv", ["stage", *map(str, options)])
    threads = torch.get_num_threads()
    module.main()
    torch.set_num_threads(threads)
    assert open_tensor_file(target).metadata["ss_network_dim"] == "2"
