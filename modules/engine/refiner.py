"""The change from the base model to a refiner: which models run, and how latents cross over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modules.choices import RefinerSwapMethod
from modules.engine.sampler_contract import Denoise
from modules.errors import ModelFileUnusable

if TYPE_CHECKING:
    from modules.engine.latents import LatentStatistics

FULL_DENOISE = 0.9
SINGLE_MODEL_EXPONENT = 0.834
VAE_SIGMA_SCALE = 1.4
INTERPOSER_WIDTH = 64
INTERPOSER_BLOCKS = 12


def _nothing() -> None:
    pass


def _identity(latents: Tensor) -> Tensor:
    return latents


@dataclass(frozen=True)
class Refiner:
    """A second model that takes over within a run.

    Attributes:
        denoise: its model evaluation, with the conditioning converted for it.
        switch_step: 0-based step of the change; at or beyond the number of steps it never comes.
        method: `joint` changes the model inside one sampler run, after the first evaluation of the switch
            step; `separate` ends the run there and starts another one from its noisy latents; `vae` ends
            it with clean latents, converts them and adds noise again.
        convert: clean latents from the base's model space to the refiner's; `vae` uses it.
        on_switch: called when the model changes, to take off what sits on the base's network.
    """

    denoise: Denoise
    switch_step: int
    method: RefinerSwapMethod = RefinerSwapMethod.JOINT
    convert: Callable[[Tensor], Tensor] = _identity
    on_switch: Callable[[], None] = _nothing


class ModelUse(StrEnum):
    """Which models a run uses."""

    BOTH = "both"
    BASE = "base"
    REFINER = "refiner"


def models_for_sd15(steps: int, switch_step: int, strength: float) -> ModelUse:
    """Which models run with a Stable Diffusion 1.5 refiner, whose latents are of another kind.

    Above a strength of 0.9 both do, by the swap method `vae`; below, one model does everything: the base
    if its share of the steps is needed for the strength, else the refiner.

    Args:
        steps, switch_step: steps of the run, and the step of the change.
        strength: share of the schedule that is run, 0 to 1.
    """
    if strength > FULL_DENOISE:
        return ModelUse.BOTH
    refiner_share = max(0.0, (steps - switch_step) / steps)
    return ModelUse.BASE if strength > refiner_share**SINGLE_MODEL_EXPONENT else ModelUse.REFINER


def coloured_noise(noise: Tensor, noise_pred: Tensor) -> Tensor:
    """`noise` with its mean over channels replaced by that of the base's last noise estimate.

    Args:
        noise, noise_pred: (B, 4, h, w).
    """
    return noise + (noise_pred.mean(dim=1, keepdim=True) - noise.mean(dim=1, keepdim=True))


def renoised_sigmas(sigmas: Tensor, switch_step: int) -> Tensor:
    """Levels of the second stage of the swap method `vae`: 1.4 times what is left of the schedule."""
    return sigmas[switch_step:] * VAE_SIGMA_SCALE


class Interposer(nn.Module):
    """Network from SDXL latents to Stable Diffusion 1.5 latents, both as their VAEs encode them.

    The published "XL to v1" interposer: a head, 12 residual blocks of 64 channels with batch norm, a tail.
    """

    def __init__(self) -> None:
        super().__init__()
        self.head = _Head()
        blocks: list[nn.Module] = [nn.Identity()]  # Published keys count the blocks from 1.
        blocks += [_Block() for _ in range(INTERPOSER_BLOCKS)]
        self.core = nn.Sequential(*blocks, nn.BatchNorm2d(INTERPOSER_WIDTH), nn.SiLU())
        self.tail = _conv(INTERPOSER_WIDTH, 4)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, 4, h, w) to (B, 4, h, w)."""
        converted: Tensor = self.tail(self.core(self.head(latents)))
        return converted


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = INTERPOSER_WIDTH
        self.long = nn.Sequential(_conv(4, width), nn.SiLU(), _conv(width, width), nn.SiLU(), _conv(width, width))
        self.short = _conv(4, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.long(x) + self.short(x))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        width = INTERPOSER_WIDTH
        self.norm = nn.BatchNorm2d(width)
        self.long = nn.Sequential(_conv(width, width), nn.SiLU(), _conv(width, width), nn.SiLU(), _conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.relu(self.long(x) + x)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def load_interposer(path: Path) -> Interposer:
    """The interposer of a file, ready to run in float32 on the CPU.

    Raises:
        ModelFileMissing, ModelFileUnusable: no such file, or it holds another network.
    """
    from modules.engine.tensorfile import open_tensor_file

    file = open_tensor_file(path)
    network = Interposer()
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    wanted = {key: shape for key, shape in expected.items() if not key.endswith("num_batches_tracked")}
    wrong = [key for key, shape in wanted.items() if tuple(file.shapes.get(key, ())) != shape]
    if wrong:
        raise ModelFileUnusable(
            f"{path.name!r} is not the SDXL to SD 1.5 interposer: {wrong[0]!r} is missing or of another shape, "
            f"as are {len(wrong) - 1} more; download 'xl-to-v1_interposer-v4.0.safetensors'."
        )
    network.load_state_dict({key: file.read(key).float() for key in wanted}, strict=False)
    return network.eval().requires_grad_(False)


def interposed(interposer: Interposer, base: LatentStatistics, refiner: LatentStatistics) -> Callable[[Tensor], Tensor]:
    """A conversion of clean latents from the base's model space to the refiner's, for `Refiner.convert`."""

    def convert(latents: Tensor) -> Tensor:
        with torch.inference_mode():
            converted = interposer(base.to_vae(latents).float().cpu())
        return refiner.to_model(converted).to(latents)

    return convert
