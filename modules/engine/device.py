"""Which device computes, and in which number formats: one policy object for the whole engine."""

from dataclasses import dataclass
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "fp16", "bf16"]

FORMATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HALF_FROM_PARAMETERS = 300_000_000  # below, a network is bound by call overhead, and half precision gains nothing


@dataclass(frozen=True)
class DevicePolicy:
    """Where the networks run and in which formats; latents, samplers and text embeddings are float32 everywhere.

    unet: format of UNets with at least `HALF_FROM_PARAMETERS` parameters; smaller ones use float32 on a CPU.
    text: format of the text encoders' weights.
    vae: format of the VAE; never float16 unless asked for: the published SDXL VAE overflows in it.
    channels_last: whether half-precision convolutions get this memory layout, which is faster for them.
    """

    device: torch.device
    unet: torch.dtype
    text: torch.dtype
    vae: torch.dtype
    channels_last: bool
    fixed: bool = False

    def unet_for(self, parameters: int) -> torch.dtype:
        """Format for a UNet of this many parameters."""
        small = self.device.type == "cpu" and parameters < HALF_FROM_PARAMETERS
        return torch.float32 if small and not self.fixed else self.unet


def choose_policy(
    device: str = "auto",
    *,
    precision: Precision = "auto",
    vae_precision: Precision = "auto",
    text_precision: Precision = "auto",
) -> DevicePolicy:
    """The policy for a device: "auto", "cpu", "cuda", "cuda:1", "mps" or "xpu".

    On a CPU: bfloat16 with AMX or AVX512-BF16, else float32; a wish for float16 becomes bfloat16, which no
    CPU computes slower. On CUDA: bfloat16 from compute capability 8 on, else float16; the VAE bfloat16 or
    float32.
    """
    chosen = torch.device(_best_device() if device == "auto" else device)
    if precision != "auto":
        unet = FORMATS[precision]
        if chosen.type == "cpu" and unet == torch.float16:
            unet = torch.bfloat16
    elif chosen.type == "cpu":
        unet = torch.bfloat16 if cpu_has_bf16() else torch.float32
    else:
        unet = _accelerator_format(chosen)
    if vae_precision != "auto":
        vae = FORMATS[vae_precision]
    else:
        vae = torch.bfloat16 if chosen.type == "cuda" and unet == torch.bfloat16 else torch.float32
    if text_precision != "auto":
        text = FORMATS[text_precision]
    else:
        text = unet if chosen.type in ("cuda", "xpu") else torch.float32
    return DevicePolicy(
        device=chosen,
        unet=unet,
        text=text,
        vae=vae,
        channels_last=chosen.type in ("cpu", "cuda") and {unet, vae} != {torch.float32},
        fixed=precision != "auto",
    )


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AMX or AVX512-BF16)."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if torch.xpu.is_available():
        return "xpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _accelerator_format(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16
    return torch.float16 if device.type == "xpu" else torch.float32
