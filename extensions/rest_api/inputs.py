"""Fetches, decodes and stores the pictures of a request, so that its record can show and reuse them."""

from modules.images import ImageSources, read_image, store_input
from modules.params import ImagePrompt
from modules.request import GenerationRequest

_FIELDS = ("uov_input_image", "inpaint_input_image", "inpaint_mask_image_upload", "enhance_input_image")
_MASK = "inpaint_mask_image_upload"


def with_stored_inputs(request: GenerationRequest, sources: ImageSources) -> GenerationRequest:
    """The request with the path of a stored input in place of each picture; blocks, call it from a thread.

    Raises:
        UnreadableImage: a picture cannot be had; nothing was queued.
        StorageFull: a picture cannot be stored.
    """
    if not request.has_input_images:
        return request
    changes: dict[str, object] = {
        name: _stored(value, name, sources, as_mask=name == _MASK)
        for name in _FIELDS
        if (value := getattr(request, name))
    }
    if any(prompt.cn_img for prompt in request.controlnet_image):
        changes["controlnet_image"] = [
            _with_stored_image(prompt, index, sources) for index, prompt in enumerate(request.controlnet_image)
        ]
    return request.changed(**changes)


def _with_stored_image(prompt: ImagePrompt, index: int, sources: ImageSources) -> ImagePrompt:
    if not prompt.cn_img:
        return prompt
    stored = _stored(prompt.cn_img, ("controlnet_image", index, "cn_img"), sources)
    return prompt.model_copy(update={"cn_img": stored})


def _stored(value: str, field: str | tuple[str | int, ...], sources: ImageSources, *, as_mask: bool = False) -> str:
    image = read_image(value, field=field, sources=sources, as_mask=as_mask)
    if image is None or sources.output_root is None:
        return ""
    return store_input(image, sources.output_root)
