"""One model evaluation: noisy latents and their level in, the guided estimate of the clean latents out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modules.engine.formats import computed_format
from modules.engine.guidance import Guidance
from modules.engine.packed_convolutions import PackedConvolutions
from modules.engine.sigmas import ModelSampling
from modules.engine.text_projections import TextProjections

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    from modules.engine.condition import Conditioning

LAST_TIMESTEP = 999.0


@dataclass(frozen=True, slots=True)
class ModelCall:
    """A forward pass that is about to happen; n rows are some images, each once or twice.

    Attributes:
        sample: (n, 4, h, w) scaled input in the network's format.
        timestep: 0-d.
        sigma: noise level, of all rows.
        percent: share of the denoising that is done, 0 to 1; a feature with a limit is active below it.
        prompt_embeds: (n, 77·k, C) in the network's format.
        added: `text_embeds` (n, P) and `time_ids` (n, 6), or nothing where the network takes no vector.
        images: for each row the index of its image.
        positive: for each row whether it answers to the prompt, else to the negative prompt.
    """

    sample: Tensor
    timestep: Tensor
    sigma: float
    percent: float
    prompt_embeds: Tensor
    added: Mapping[str, Tensor] | None
    images: tuple[int, ...]
    positive: tuple[bool, ...]


Extra = Callable[[ModelCall], Mapping[str, Any]]
"""Asked before every forward pass for more keyword arguments of the UNet, such as ControlNet residuals.

It may also prepare what sits inside the network, such as image-prompt attention. A feature that changes the
latents themselves wraps the denoiser instead.
"""


@dataclass(frozen=True, slots=True)
class _Pass:
    """Rows that go through the network together, with their constant inputs in its format."""

    prompt_embeds: Tensor
    emphasised: Mapping[str, Tensor] | None
    consistent: Mapping[str, Tensor] | None
    images: tuple[int, ...]
    positive: tuple[bool, ...]
    copies: int


class Denoiser:
    """`denoise(x, sigma) -> denoised` around a UNet, for B images at once.

    Prompt and negative prompt go through the network in one call where their texts are equally long, else
    in two; at a guidance scale of 1 the negative prompt is not evaluated at all.

    Attributes:
        evaluations: how often the denoiser was called.
        model_seconds: wall time spent inside the network, and inside the networks of `extras`.

    Args:
        unet: the network; it is called in its own number format and on its own device, and its weights must
            stay as they are while this denoiser is used.
        model_sampling: what its input and output mean.
        positive: conditioning of B images.
        negative: conditioning of the same images; may be None at a guidance scale of 1.
        guidance: how both answers are combined.
        adm_end: share of the diffusion's timesteps, counted from its start, in which the emphasised
            `time_ids` are used, 0 to 1.
        extras: features that add to every forward pass.
        check: called before every evaluation; may raise to end the run.
    Raises:
        ValueError: there is no negative conditioning and the guidance needs it.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        model_sampling: ModelSampling,
        positive: Conditioning,
        negative: Conditioning | None,
        guidance: Guidance,
        *,
        adm_end: float = 0.3,
        extras: Sequence[Extra] = (),
        check: Callable[[], None] | None = None,
    ) -> None:
        if negative is None and not guidance.is_neutral:
            raise ValueError(f"A guidance scale of {guidance.scale} needs a negative conditioning.")
        weight = next(iter(unet.parameters()))
        self._unet = unet
        self._dtype, self._device = computed_format(unet), weight.device
        self.model_sampling = model_sampling
        self.guidance = guidance
        self._conditionings = (positive,) if guidance.is_neutral or negative is None else (positive, negative)
        self._emphasised_above = LAST_TIMESTEP * (1.0 - adm_end)
        self._extras = tuple(extras)
        self._text_projections = TextProjections(unet)
        self._convolutions = PackedConvolutions(unet)
        self._check = check
        self._images = tuple(range(positive.prompt_embeds.shape[0]))
        self._passes = self._build_passes()
        self.evaluations = 0
        self.model_seconds = 0.0

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        """The guided estimate of the clean latents.

        Args:
            x: (B, 4, h, w) float32 noisy latents.
            sigma: their noise level, in latent standard deviations.
        Returns:
            (B, 4, h, w) float32; zeros for images that were dropped.
        """
        if self._check is not None:
            self._check()
        self.evaluations += 1
        if len(self._images) == x.shape[0]:
            return self._evaluate(x, sigma)
        rows = list(self._images)
        denoised = torch.zeros_like(x)
        denoised[rows] = self._evaluate(x[rows], sigma)
        return denoised

    def drop(self, image: int) -> None:
        """Leave an image of the batch out from the next evaluation on; the others do not notice.

        Raises:
            ValueError: it is the last one left, or was dropped before.
        """
        left = tuple(index for index in self._images if index != image)
        if not left or len(left) == len(self._images):
            raise ValueError(f"Image {image} cannot be dropped; {list(self._images)} are in work.")
        self._images = left
        self._passes = self._build_passes()

    def _evaluate(self, x: Tensor, sigma: float) -> Tensor:
        timestep = self.model_sampling.sigma_to_timestep(sigma)
        moment = float(timestep)  # Read before it goes to the device, which would have to finish its work first.
        timestep = timestep.to(self._device)
        progress = 1.0 - moment / LAST_TIMESTEP
        scaled = self.model_sampling.scaled_input(x, sigma).to(self._device, self._dtype)
        outputs: list[Tensor] = []
        for item in self._passes:
            outputs += self._forward(item, scaled, timestep, sigma, moment).chunk(item.copies)
        answers = [self.model_sampling.denoised_from(output.to(x.device, x.dtype), x, sigma) for output in outputs]
        if len(answers) == 1:
            return answers[0]
        return self.guidance.combined(x, answers[0], answers[1], progress)

    def _forward(self, item: _Pass, scaled: Tensor, timestep: Tensor, sigma: float, moment: float) -> Tensor:
        added = item.emphasised if moment > self._emphasised_above else item.consistent
        sample = scaled if item.copies == 1 else torch.cat([scaled] * item.copies)
        started = time.perf_counter()
        with torch.inference_mode(), self._text_projections.in_use(item.prompt_embeds), self._convolutions.in_use():
            output: Tensor = self._unet(
                sample,
                timestep,
                encoder_hidden_states=item.prompt_embeds,
                added_cond_kwargs=added,
                return_dict=False,
                **self._more_arguments(item, sample, timestep, sigma, added),
            )[0]
        if output.device.type == "cuda":
            torch.cuda.synchronize(output.device)
        self.model_seconds += time.perf_counter() - started
        return output

    def _more_arguments(
        self, item: _Pass, sample: Tensor, timestep: Tensor, sigma: float, added: Mapping[str, Tensor] | None
    ) -> dict[str, Any]:
        if not self._extras:
            return {}
        percent = self.model_sampling.sigma_to_percent(sigma)
        call = ModelCall(sample, timestep, sigma, percent, item.prompt_embeds, added, item.images, item.positive)
        return {name: value for extra in self._extras for name, value in extra(call).items()}

    def _build_passes(self) -> tuple[_Pass, ...]:
        signs = (True, False)[: len(self._conditionings)]
        lengths = {conditioning.prompt_embeds.shape[1] for conditioning in self._conditionings}
        if len(lengths) == 1:
            return (self._pass(self._conditionings, signs),)
        return tuple(self._pass([item], [sign]) for item, sign in zip(self._conditionings, signs, strict=True))

    def _pass(self, conditionings: Sequence[Conditioning], positive: Sequence[bool]) -> _Pass:
        rows = list(self._images)

        def joined(tensors: Sequence[Tensor]) -> Tensor:
            return torch.cat([tensor[rows] for tensor in tensors]).to(self._device, self._dtype)

        pooled = joined([conditioning.pooled_prompt_embeds for conditioning in conditionings])

        def added(time_ids: Sequence[Tensor]) -> Mapping[str, Tensor] | None:
            # time_ids stay float32: bfloat16 would round a size of 1152 pixels.
            numbers = torch.cat([tensor[rows] for tensor in time_ids]).to(self._device)
            return {"text_embeds": pooled, "time_ids": numbers} if pooled.shape[1] else None

        return _Pass(
            prompt_embeds=joined([conditioning.prompt_embeds for conditioning in conditionings]),
            emphasised=added([conditioning.time_ids for conditioning in conditionings]),
            consistent=added([conditioning.consistent_time_ids for conditioning in conditionings]),
            images=self._images * len(conditionings),
            positive=tuple(sign for sign in positive for _ in rows),
            copies=len(conditionings),
        )
