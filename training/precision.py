"""Chooses the number format of training by measurement, and prepares networks for it.

A CPU with AMX or AVX-512 BF16 trains several times as fast in bfloat16; one without is ten times slower. In bfloat16
the optimiser keeps float32 masters, attention is plain matrix products, and group normalisation is an operator of our
own where a compiler is at hand: PyTorch's versions of both are slow in this format.
"""

import argparse
import contextlib
import functools
import logging
import os
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils import cpp_extension

logger = logging.getLogger(__name__)

WORTH_IT = 1.5
COMPILATION_S = 600
FORMATS = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16}


def training_step_seconds(dtype: torch.dtype, *, repeats: int = 3) -> float:
    """Shortest process time of a 3×3 convolution forward and backward, the bulk of the work."""
    convolution = nn.Conv2d(64, 64, 3, padding=1).to(dtype, memory_format=torch.channels_last)
    pixels = torch.randn(16, 64, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        convolution(pixels).sum().backward()
        times.append(time.process_time() - start)
    return min(times[1:])


def add_precision_option(parser: argparse.ArgumentParser) -> None:
    """Give a stage's parser the option that `chosen_dtype` reads."""
    parser.add_argument("--precision", choices=list(FORMATS), default="auto", help="auto measures which is faster")


def chosen_dtype(precision: str) -> torch.dtype:
    """The format that the option names; for "auto" the faster one."""
    return FORMATS[precision] or measured_dtype()


def measured_dtype() -> torch.dtype:
    """bfloat16 where it is at least half as fast again as float32, else float32."""
    seconds = {dtype: training_step_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    gain = seconds[torch.float32] / seconds[torch.bfloat16]
    logger.info("bfloat16 is %.2f times as fast as float32 here", gain)
    return torch.bfloat16 if gain >= WORTH_IT else torch.float32


def drop_stale_lock(lock: Path) -> None:
    """Remove the lock of a compilation that was killed: PyTorch would wait for its end for ever."""
    with contextlib.suppress(FileNotFoundError):
        if time.time() - lock.stat().st_mtime > COMPILATION_S:
            lock.unlink()


@functools.cache
def compiled_operator() -> ModuleType | None:
    """The operator of groupnorm.cpp, compiled for this CPU; None without a compiler."""
    try:
        flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp-simd"]
        source = Path(__file__).with_name("groupnorm.cpp")
        folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")).expanduser() / "focale"
        folder.mkdir(parents=True, exist_ok=True)
        drop_stale_lock(folder / "lock")
        built = cpp_extension.load("focale_groupnorm", [str(source)], extra_cflags=flags, build_directory=str(folder))
        return cast(ModuleType, built)
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        logger.warning("groupnorm.cpp was not compiled, training is slower: %s", str(error).splitlines()[0])
        return None


class _GroupNormFunction(torch.autograd.Function):
    """Group normalisation of (N, C, …) bfloat16 by the compiled operator."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, weight: Tensor, bias: Tensor, groups: int, epsilon: float) -> Tensor:
        operator = compiled_operator()
        assert operator is not None
        rows = _channels_last_rows(pixels)
        output, means, scales = operator.forward(rows, weight.float(), bias.float(), groups, epsilon)
        ctx.save_for_backward(rows, weight, means, scales)
        ctx.groups, ctx.shape = groups, pixels.shape
        return _channels_first(output, pixels.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        operator = compiled_operator()
        assert operator is not None
        rows, weight, means, scales = ctx.saved_tensors
        upstream = _channels_last_rows(gradients[0])
        of_input, of_weight, of_bias = operator.backward(upstream, rows, weight.float(), means, scales, ctx.groups)
        shape = _channels_first(of_input, ctx.shape)
        return shape, of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None


def _channels_last_rows(pixels: Tensor) -> Tensor:
    """(N, C, …) as contiguous (N, places, C); free of charge for channels-last memory."""
    return pixels.flatten(2).transpose(1, 2).contiguous()


def _channels_first(rows: Tensor, shape: torch.Size) -> Tensor:
    return rows.transpose(1, 2).unflatten(2, shape[2:]) if len(shape) > 3 else rows.transpose(1, 2)


class FusedGroupNorm(nn.GroupNorm):
    """GroupNorm that takes the compiled operator for bfloat16 and PyTorch's for everything else."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, …)."""
        if input.dtype != torch.bfloat16 or compiled_operator() is None:
            return super().forward(input)
        arguments = (input, self.weight, self.bias, self.num_groups, self.eps)
        return cast(Tensor, _GroupNormFunction.apply(*arguments))


def use_fused_norms(network: nn.Module) -> None:
    """Let every GroupNorm of a network take the compiled operator; names and weights stay."""
    for module in network.modules():
        if type(module) is nn.GroupNorm:
            module.__class__ = FusedGroupNorm


def prepare(network: nn.Module, dtype: torch.dtype) -> None:
    """Bring a network into the format: memory layout, weights, normalisation and attention."""
    for module in network.modules():
        if isinstance(module, UNet2DConditionModel | AutoencoderKL):
            module.to(memory_format=torch.channels_last)
            if dtype == torch.bfloat16:
                module.set_attn_processor(AttnProcessor())
    if dtype == torch.bfloat16:
        use_fused_norms(network)
        network.to(dtype)
