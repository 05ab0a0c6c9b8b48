"""Draws pictures from a checkpoint in the plainest way: Euler steps, guidance, the engine's conditioning.

Deliberately a few lines on the model classes alone, so that the judge does not depend on the application's samplers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor, nn

from modules.engine.device import choose_policy
from modules.engine.loras import LoraChoice
from modules.engine.store import ModelStore
from training.checkpoints import read_network, read_vae
from training.nets import DOWNSCALE, NATIVE_PX, SCALING_FACTOR, alphas_cumprod
from training.precision import prepare
from training.prompts import consistent_time_ids


@dataclass(frozen=True)
class Family:
    """What draws.

    Attributes:
        network: {"unet", "text"}.
        vae: decodes its latents.
    """

    network: nn.ModuleDict
    vae: AutoencoderKL


def load_family(
    checkpoint: Path, vocabulary: Path, *, lora: Path | None = None, dtype: torch.dtype = torch.float32
) -> Family:
    """The networks of an exported checkpoint, in evaluation mode.

    Args:
        lora: file that the engine merges into the UNet.
        dtype: of the UNet.
    """
    network = read_network(checkpoint, vocabulary).requires_grad_(False).eval()
    if lora is not None:
        model = ModelStore(choose_policy("cpu", precision="fp32")).base(checkpoint)
        with model.loras.merged([LoraChoice(lora, 1.0)]):
            network["unet"].load_state_dict(model.unet.state_dict())
    prepare(network["unet"], dtype)
    return Family(network, read_vae(checkpoint).to(memory_format=torch.channels_last).eval())


def evenly_spaced_sigmas(steps: int) -> tuple[Tensor, Tensor]:
    """(steps,) timesteps from 999 down, evenly spaced, and (steps + 1,) noise levels ending in 0."""
    signal = alphas_cumprod()
    table = ((1 - signal) / signal).sqrt()
    timesteps = torch.linspace(999, 0, steps + 1)[:-1].round().long()
    return timesteps, torch.cat([table[timesteps], torch.zeros(1)])


@torch.inference_mode()
def draw(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 30,
    guidance_scale: float = 4.0,
    height: int = NATIVE_PX,
    width: int = NATIVE_PX,
) -> Tensor:
    """(B, 3, height, width) pixels in −1…1, one per prompt and seed; guidance 1 skips the empty prompt."""
    text, unet = family.network["text"], family.network["unet"]
    count, guided = len(prompts), guidance_scale != 1.0
    encoding = text([*prompts, *([""] * count if guided else [])])
    time_ids = torch.tensor([consistent_time_ids(height, width)] * len(encoding.hidden))
    conditions = {"text_embeds": encoding.pooled, "time_ids": time_ids}
    timesteps, sigmas = evenly_spaced_sigmas(steps)
    shape = (4, height // DOWNSCALE, width // DOWNSCALE)
    hidden = encoding.hidden.to(unet.dtype)
    noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    latents = noise * (1 + sigmas[0] ** 2).sqrt()
    for index, timestep in enumerate(timesteps):
        scaled = latents / (1 + sigmas[index] ** 2).sqrt()
        rows = (torch.cat([scaled, scaled]) if guided else scaled).contiguous(memory_format=torch.channels_last)
        predicted = unet(rows.to(unet.dtype), timestep, hidden, added_cond_kwargs=conditions).sample.float()
        if guided:
            wanted, empty = predicted.chunk(2)
            predicted = empty + guidance_scale * (wanted - empty)
        latents = latents + predicted * (sigmas[index + 1] - sigmas[index])
    pixels: Tensor = family.vae.decode(latents / SCALING_FACTOR).sample
    return pixels.clamp(-1, 1)


def contact_sheet(pixels: Tensor, *, columns: int) -> Image.Image:
    """All pictures in rows, from (B, 3, height, width) in −1…1."""
    count, _, height, width = pixels.shape
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    for index, picture in enumerate(((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()):
        sheet.paste(Image.fromarray(picture), (index % columns * width, index // columns * height))
    return sheet
