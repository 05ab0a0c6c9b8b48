"""Every sampler by its public name, with what a caller must know before it runs one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from modules.engine import samplers_euler, samplers_multistep, samplers_sde
from modules.engine.sampler_contract import Denoise, Noise, SamplerRun, SamplerStep
from modules.engine.sigmas import DISCARDS_PENULTIMATE, ModelSampling

__all__ = ["SAMPLERS", "Denoise", "Noise", "Sampler", "SamplerRun", "SamplerStep"]


@dataclass(frozen=True)
class Sampler:
    """A way to step from noise to clean latents.

    Attributes:
        name: public name.
        function: `f(denoise, x, sigmas, noise)`, a generator of SamplerStep that returns the final latents.
        calls_per_step: model evaluations in a step, except in the last, which needs one.
        needs_brownian: asks its noise for Brownian increments.
        discards_penultimate: runs on a schedule without its second-to-last level.
        rows_together: rows of a batch do not influence each other; otherwise run it row by
            row; such a sampler draws no noise.
        knows_model: also takes the keyword `model_sampling`.
    """

    name: str
    function: Callable[..., SamplerRun]
    calls_per_step: int = 1
    needs_brownian: bool = False
    rows_together: bool = True
    knows_model: bool = False

    @property
    def discards_penultimate(self) -> bool:
        """Whether the schedule leaves out its second-to-last level."""
        return self.name in DISCARDS_PENULTIMATE

    def run(
        self, denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, model_sampling: ModelSampling
    ) -> SamplerRun:
        """Start a run.

        Args:
            denoise: the model's estimate of the clean latents.
            x: (B, 4, h, w) float32, noisy latents at the first level; never changed in place.
            sigmas: (steps + 1,) float32 on the CPU, descending.
            noise: random numbers of the run, with `span` called if `needs_brownian`.
            model_sampling: of the network behind `denoise`.
        """
        if self.knows_model:
            return self.function(denoise, x, sigmas, noise, model_sampling=model_sampling)
        return self.function(denoise, x, sigmas, noise)

    def yields(self, steps: int) -> int | None:
        """How often a run of `steps` steps yields; None where the sampler decides on its way."""
        if self.name == "dpm_adaptive":
            return None
        return steps // 3 + 1 if self.name == "dpm_fast" else steps


_ALL = (
    Sampler("euler", samplers_euler.euler),
    Sampler("euler_ancestral", samplers_euler.euler_ancestral),
    Sampler("heun", samplers_euler.heun, calls_per_step=2),
    Sampler("heunpp2", samplers_euler.heunpp2, calls_per_step=3),
    Sampler("dpm_2", samplers_euler.dpm_2, calls_per_step=2),
    Sampler("dpm_2_ancestral", samplers_euler.dpm_2_ancestral, calls_per_step=2),
    Sampler("lms", samplers_multistep.lms),
    Sampler("dpm_fast", samplers_multistep.dpm_fast),
    Sampler("dpm_adaptive", samplers_multistep.dpm_adaptive, calls_per_step=3, rows_together=False),
    Sampler("dpmpp_2s_ancestral", samplers_sde.dpmpp_2s_ancestral, calls_per_step=2),
    Sampler("dpmpp_sde", samplers_sde.dpmpp_sde, calls_per_step=2, needs_brownian=True),
    Sampler("dpmpp_sde_gpu", samplers_sde.dpmpp_sde, calls_per_step=2, needs_brownian=True),
    Sampler("dpmpp_2m", samplers_sde.dpmpp_2m),
    Sampler("dpmpp_2m_sde", samplers_sde.dpmpp_2m_sde, needs_brownian=True),
    Sampler("dpmpp_2m_sde_gpu", samplers_sde.dpmpp_2m_sde, needs_brownian=True),
    Sampler("dpmpp_3m_sde", samplers_sde.dpmpp_3m_sde, needs_brownian=True),
    Sampler("dpmpp_3m_sde_gpu", samplers_sde.dpmpp_3m_sde, needs_brownian=True),
    Sampler("ddpm", samplers_euler.euler_ancestral),
    Sampler("lcm", samplers_euler.lcm),
    Sampler("tcd", samplers_euler.tcd, knows_model=True),
    Sampler("restart", samplers_euler.restart, calls_per_step=2),
    Sampler("ddim", samplers_euler.euler),
    Sampler("uni_pc", samplers_multistep.uni_pc),
    Sampler("uni_pc_bh2", samplers_multistep.uni_pc_bh2),
)

SAMPLERS: Mapping[str, Sampler] = MappingProxyType({sampler.name: sampler for sampler in _ALL})
"""Samplers by public name."""
