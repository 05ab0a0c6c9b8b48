"""Every load of weights is told once, with what was loaded."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from modules.engine.device import choose_policy
from modules.engine.loras import LoraChoice
from modules.engine.store import ModelStore
from modules.loads import ModelLoad, listen
from tests.tiny_sdxl import write_tiny

LAYER = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


def test_checkpoint_vae_refiner_and_lora_are_told_when_they_are_read_and_not_when_they_are_there(tmp_path: Path):
    path = write_tiny(tmp_path / "model.safetensors")
    store = ModelStore(choose_policy("cpu", precision="fp32"))
    told: list[ModelLoad] = []
    end = listen(told.append)
    for _ in range(2):
        model = store.base(path)
        store.vae(path, scaling_factor=model.facts.scaling_factor)
        store.refiner(path)
    width = model.unet.get_parameter("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight").shape[0]
    parts = {f"{LAYER}.lora_up.weight": torch.ones(width, 1), f"{LAYER}.lora_down.weight": torch.ones(1, width)}
    save_file(parts, tmp_path / "style.safetensors")
    for _ in range(2):
        model.loras.select([LoraChoice(tmp_path / "style.safetensors", 0.5)])
    end()
    assert [(load.kind, load.name) for load in told] == [
        ("checkpoint", "model.safetensors"),
        ("vae", "model.safetensors"),
        ("refiner", "model.safetensors"),
        ("lora", "style.safetensors"),
    ]
    assert all(0 < load.seconds < 60 for load in told)
