"""GenerationRequest: what was asked, in the words of the wire."""

import secrets
from collections.abc import Mapping
from typing import Any, Self

from pydantic import ValidationError

from modules.choices import MAX_RANDOM_SEED, ImageTab
from modules.params import (
    ControlParams,
    DebugParams,
    DeliveryParams,
    EnhanceCtrl,
    EnhanceParams,
    FreeUParams,
    ImagePrompt,
    InpaintParams,
    InputImageParams,
    ModelParams,
    PromptParams,
    SavingParams,
    SettingsParams,
)

IMAGE_PROMPT_SLOTS = 4
ENHANCE_SLOTS = 3


class GenerationRequest(
    DeliveryParams,
    EnhanceParams,
    SavingParams,
    InpaintParams,
    FreeUParams,
    ControlParams,
    DebugParams,
    InputImageParams,
    ModelParams,
    SettingsParams,
    PromptParams,
    label="Request",
):
    """One request for pictures; every key is optional, `{}` is valid.

    `model_fields_set` tells which keys were sent. Frozen: a change makes the next request (`changed`).
    """

    def changed(self, **values: object) -> Self:
        """This request with some values replaced; the new values count as sent.

        Raises:
            pydantic.ValidationError: a value does not fit its field.
        """
        # Only touched fields are validated anew; the others were validated when this request was made.
        checked = type(self).model_validate(values)
        return self.model_copy(update={name: getattr(checked, name) for name in values})

    @property
    def has_input_images(self) -> bool:
        """True when any picture was sent."""
        return bool(
            self.uov_input_image
            or self.inpaint_input_image
            or self.inpaint_mask_image_upload
            or self.enhance_input_image
            or any(prompt.cn_img for prompt in self.controlnet_image)
        )


def with_resolved_seed(request: GenerationRequest) -> GenerationRequest:
    """The request with its seed drawn if it asked for a random one.

    Drawn seeds stay below 2^53, so that they survive JavaScript.
    """
    if request.image_seed >= 0:
        return request
    return request.changed(image_seed=secrets.randbelow(MAX_RANDOM_SEED + 1))


def tab_of(request: GenerationRequest) -> ImageTab:
    """Which image input decides (api contract, order: enhance, image prompts, vary/upscale, inpaint)."""
    if request.enhance_input_image:
        return ImageTab.ENHANCE
    if any(prompt.cn_img for prompt in request.controlnet_image):
        return ImageTab.IMAGE_PROMPT
    if request.uov_input_image:
        return ImageTab.UOV
    if request.inpaint_input_image:
        return ImageTab.INPAINT
    return request.current_tab


def normalised(request: GenerationRequest) -> GenerationRequest:
    """The request as it is stored: tab from the images, forced switches, padded lists."""
    prompts = tuple(request.controlnet_image[:IMAGE_PROMPT_SLOTS])
    passes = tuple(request.enhance_ctrls[:ENHANCE_SLOTS])
    distances = tuple(max(0, distance) for distance in request.outpaint_distance)
    return request.changed(
        current_tab=tab_of(request),
        input_image_checkbox=True,
        invert_mask_checkbox=False,
        controlnet_image=prompts + (ImagePrompt(),) * (IMAGE_PROMPT_SLOTS - len(prompts)),
        enhance_ctrls=passes + (EnhanceCtrl(),) * (ENHANCE_SLOTS - len(passes)),
        outpaint_distance=distances + (0,) * (4 - len(distances)),
        image_number=1 if request.enhance_input_image else request.image_number,
    )


def to_params(request: GenerationRequest) -> dict[str, Any]:
    """The request as plain JSON values: what a record keeps as `req_params`, and what can be posted again."""
    return request.model_dump(mode="json")


def from_params(params: Mapping[str, Any]) -> GenerationRequest:
    """A request from a record's `req_params`.

    Raises:
        pydantic.ValidationError: the values do not fit.
    """
    return GenerationRequest.model_validate(dict(params))


__all__ = [
    "GenerationRequest",
    "ValidationError",
    "from_params",
    "normalised",
    "tab_of",
    "to_params",
    "with_resolved_seed",
]
