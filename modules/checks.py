"""Refuses requests that cannot be met, before anything is queued."""

from collections.abc import Callable
from dataclasses import replace

from modules.choices import UovMethod
from modules.errors import InvalidRequest, NotSupportedYet, UnknownName
from modules.plan import PlanResources, make_plan
from modules.provision import Provision
from modules.request import GenerationRequest

# What an image input would do to the picture, told to the person whose request is refused.
_NOT_YET = "This version cannot {what} yet. Leave {field} out to make a picture from words alone."


def check_supported(request: GenerationRequest) -> None:
    """Refuse what would give a wrong picture rather than ignore it.

    Raises:
        NotSupportedYet: the request asks for a feature of image inputs.
    """
    for field, what, is_asked in _IMAGE_FEATURES:
        if is_asked(request):
            raise NotSupportedYet(field, _NOT_YET.format(what=what, field=field), "given")


def _wants_inpaint(request: GenerationRequest) -> bool:
    """An inpaint picture without mask and without direction paints nothing: that is a plain text-to-image request."""
    return bool(request.inpaint_input_image) and bool(request.inpaint_mask_image_upload or request.outpaint_selections)


_IMAGE_FEATURES: tuple[tuple[str, str, Callable[[GenerationRequest], bool]], ...] = (
    (
        "uov_input_image",
        "vary or enlarge a picture",
        lambda request: bool(request.uov_input_image) and request.uov_method is not UovMethod.DISABLED,
    ),
    ("inpaint_input_image", "repaint or extend a picture", _wants_inpaint),
    (
        "controlnet_image",
        "be guided by a picture",
        lambda request: any(prompt.cn_img for prompt in request.controlnet_image),
    ),
    (
        "enhance_input_image",
        "enhance a picture",
        lambda request: bool(request.enhance_input_image),
    ),
    (
        "enhance_checkbox",
        "enhance finished pictures",
        lambda request: (
            request.enhance_checkbox
            and (
                request.enhance_uov_method is not UovMethod.DISABLED
                or any(enhancement.enhance_enabled for enhancement in request.enhance_ctrls)
            )
        ),
    ),
)


class RequestChecks:
    """All checks in one call, against what this machine offers at that moment."""

    def __init__(self, resources: Callable[[], PlanResources], provision: Provision) -> None:
        """Check against what `resources` returns when a request comes, and what `provision` will have fetched."""
        self._resources = resources
        self._provision = provision

    def __call__(self, request: GenerationRequest) -> None:
        """Refuse a request that cannot be met.

        Raises:
            UnknownName: a style or model that no list has.
            InvalidRequest, NotSupportedYet: see `make_plan`, `Provision.check` and `check_supported`.
        """
        check_supported(request)
        resources = self._resources()
        styles = resources.prompts.styles
        for position, name in enumerate(request.style_selections):
            if name not in styles:
                raise UnknownName(("style_selections", position), name, styles.names, what="style")
        resources = replace(resources, catalogue=self._provision.check(request))
        try:
            make_plan(request.changed(image_number=1), resources)
        except UnknownName as error:
            self._offer(error)
            raise

    def _offer(self, error: UnknownName) -> None:
        """Say how to get a file that has a source.

        Raises:
            InvalidRequest: in place of `error`, if it has.
        """
        folder = _FOLDER_OF_FIELD.get(str(error.field[0]))
        if folder and self._provision.is_known(folder, str(error.value)):
            raise InvalidRequest(
                error.field,
                f"{error.value} is not in models/{folder}, but this server knows where it comes from: send "
                '"download_missing": true, or put it there.',
                error.value,
            ) from error


_FOLDER_OF_FIELD = {
    "base_model_name": "checkpoints",
    "refiner_model_name": "checkpoints",
    "vae_name": "vae",
    "loras": "loras",
}
