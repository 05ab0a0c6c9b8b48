"""Which device computes, and in which number formats: one policy object for the whole engine."""

from dataclasses import dataclass
from typing import Literal

import torch

from modules.engine.formats import NumberFormat

Precision = Literal["auto", "fp32", "fp16", "bf16"]

FORMATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HALF_FROM_PARAMETERS = 100_000_000  # below, a network is bound by call overhead, and half precision gains nothing
FLOAT32 = NumberFormat.plain(torch.float32)
AS_IN_FILE = NumberFormat(computed=torch.float32, stored=None)


@dataclass(frozen=True)
class DevicePolicy:
    """Where the networks run and in which formats; latents, samplers and text embeddings are float32 everywhere.

    unet, text: formats of UNets and text encoders of at least `HALF_FROM_PARAMETERS` parameters; smaller ones use
        float32 on a CPU unless their format was asked for.
    vae: format of the VAE; never float16 unless asked for: the published SDXL VAE overflows in it.
    channels_last: whether convolutions get this memory layout, which is faster for them.
    vae_device: where the VAE runs; everything else runs on `device`.
    asked: whether the format of "unet" or "text" was asked for, and holds for networks of every size.
    """

    device: torch.device
    unet: NumberFormat
    text: NumberFormat
    vae: NumberFormat
    channels_last: bool
    vae_device: torch.device
    asked: frozenset[str] = frozenset()

    def unet_for(self, parameters: int) -> NumberFormat:
        """Formats for a UNet of this many parameters."""
        return self._for_size("unet", self.unet, parameters)

    def text_for(self, parameters: int) -> NumberFormat:
        """Formats for a text encoder of this many parameters."""
        return self._for_size("text", self.text, parameters)

    def _for_size(self, network: str, wanted: NumberFormat, parameters: int) -> NumberFormat:
        small = self.device.type == "cpu" and parameters < HALF_FROM_PARAMETERS
        return FLOAT32 if small and network not in self.asked else wanted


def choose_policy(
    device: str = "auto",
    *,
    precision: Precision = "auto",
    vae_precision: Precision = "auto",
    text_precision: Precision = "auto",
    vae_on_cpu: bool = False,
) -> DevicePolicy:
    """The policy for a device: "auto", "cpu", "cuda", "cuda:1", "mps" or "xpu".

    A CPU with AMX or AVX512-BF16 computes large UNets in bfloat16. Any other computes in float32, and keeps the
    weights of large networks in the half format of their file: half the memory, and the same result to the bit.
    A half format that is asked for is what the weights are kept in; only such a CPU also computes in it, and in
    bfloat16 even when asked for float16. On CUDA: bfloat16 from compute capability 8 on, else float16; the VAE
    bfloat16 or float32.
    """
    chosen = torch.device(_best_device() if device == "auto" else device)
    on_cpu = chosen.type == "cpu"
    unet, text, vae = (
        None if wish == "auto" else _wished(FORMATS[wish], runs_on_cpu)
        for wish, runs_on_cpu in (
            (precision, on_cpu),
            (text_precision, on_cpu),
            (vae_precision, on_cpu or vae_on_cpu),
        )
    )
    if on_cpu:
        unet = unet or (NumberFormat.plain(torch.bfloat16) if cpu_has_bf16() else AS_IN_FILE)
        text, vae = text or AS_IN_FILE, vae or FLOAT32
    else:
        unet = unet or NumberFormat.plain(_accelerator_format(chosen))
        text = text or (unet if chosen.type in ("cuda", "xpu") else FLOAT32)
        halves_the_vae = chosen.type == "cuda" and unet.computed == torch.bfloat16 and not vae_on_cpu
        vae = vae or (unet if halves_the_vae else FLOAT32)
    return DevicePolicy(
        device=chosen,
        unet=unet,
        text=text,
        vae=vae,
        channels_last=chosen.type in ("cpu", "cuda"),
        vae_device=torch.device("cpu") if vae_on_cpu else chosen,
        asked=frozenset(name for name, wish in (("unet", precision), ("text", text_precision)) if wish != "auto"),
    )


def _wished(dtype: torch.dtype, on_cpu: bool) -> NumberFormat:
    """The formats for a wish: CPUs compute in float32, or in bfloat16 where they have instructions for it."""
    if not on_cpu or dtype == torch.float32:
        return NumberFormat.plain(dtype)
    return NumberFormat.plain(torch.bfloat16) if cpu_has_bf16() else NumberFormat(torch.float32, dtype)


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
