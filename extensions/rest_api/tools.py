"""`describe-image` and `generate_mask`: small questions about a picture, answered by the worker."""

import asyncio
import base64
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import Field
from starlette.datastructures import UploadFile

from extensions.rest_api.api import Api, ApiDep
from extensions.rest_api.bodies import ignored_fields, ignored_header, json_body, validated
from extensions.rest_api.calls import unless_gone
from extensions.rest_api.forms import form_of
from extensions.rest_api.routing import reply, route, statuses
from extensions.rest_api.wire import Json
from modules.choices import ClothCategory, ContentType, MaskModel, SamModel
from modules.errors import InvalidRequest, UnreadableImage
from modules.images import read_image, store_input
from modules.params import ParamGroup

router = APIRouter(tags=["tools"])

_KINDS = {word.lower(): content.kind for content in ContentType for word in (content.kind, content.value)}
_NO_IMAGE: dict[str, Any] = {"type": "missing", "loc": ["body", "image"], "msg": "Field required", "input": None}
_MULTIPART = {
    "type": "object",
    "properties": {"image": {"type": "string", "format": "binary"}, "image_type": {"type": "string"}},
    "required": ["image"],
}


class DescribeRequest(ParamGroup, label="Describe"):
    """A picture to find words for."""

    image: str = Field("", description="URL, data URI or base64.")
    image_type: str = Field("Photo", description="Photo or Anime.")


class MaskRequest(ParamGroup, label="Mask"):
    """A picture to find a mask in."""

    image: str = Field(description="URL, data URI or base64.")
    mask_model: MaskModel = MaskModel.ISNET_GENERAL_USE
    cloth_category: ClothCategory = ClothCategory.FULL
    dino_prompt_text: str = Field("", description="What to find, with sam only.")
    sam_model: SamModel = SamModel.VIT_B
    box_threshold: float = Field(0.3, ge=0, le=1)
    text_threshold: float = Field(0.25, ge=0, le=1)
    sam_max_detections: int = Field(0, ge=0, le=10, description="0 for all.")
    dino_erode_or_dilate: float = Field(0, ge=-64, le=64)
    dino_debug: bool = False


@route(
    router, "POST", "/v1/tools/describe-image",
    operation_id="describe_image", summary="Words for a picture",
    responses={**reply("Description"), **statuses(422, 500)},
    openapi_extra={"requestBody": {"required": True, "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/DescribeRequest"}},
        "multipart/form-data": {"schema": _MULTIPART},
    }}},
)  # fmt: skip
async def describe_image(
    request: Request,
    api: ApiDep,
    image_type: Annotated[str | None, Query(description="Photo (default) or Anime.")] = None,
) -> Response:
    """Words for a picture, sent as a file in a form or as text in JSON."""
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        image, sent_type = await _form_image(request)
        ignored: list[str] = []
    else:
        values = await json_body(request)
        asked = validated(DescribeRequest, values)
        image, sent_type = asked.image, asked.image_type if "image_type" in asked.model_fields_set else None
        ignored = ignored_fields(DescribeRequest, values)
    kind = _kind(image_type or sent_type or "Photo")
    path = await api.in_thread(partial(_input_path, api, request, image))
    words = await unless_gone(request, api.services.handlers.describe(path, (kind,)))
    return Json({"describe": words}, headers=ignored_header(ignored))


@route(
    router, "POST", "/v1/tools/generate_mask",
    operation_id="generate_mask", summary="A mask of a picture",
    responses={
        200: {"description": "Base64 PNG without prefix; white is selected",
              "content": {"application/json": {"schema": {"type": "string"}}}},
        **statuses(422, 500),
    },
    openapi_extra={"requestBody": {"required": True, "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/MaskRequest"}}}}},
)  # fmt: skip
async def generate_mask(request: Request, api: ApiDep) -> Response:
    """A mask of the same size as the picture, usable as `inpaint_mask_image_upload` as it is."""
    values = await json_body(request)
    asked = validated(MaskRequest, values)
    path = await api.in_thread(partial(_input_path, api, request, asked.image))
    options = asked.model_dump(mode="json", exclude={"image"})
    mask_path = await unless_gone(request, api.services.handlers.generate_mask(path, options))
    content = await asyncio.to_thread(_read, mask_path)
    headers = ignored_header(ignored_fields(MaskRequest, values))
    return Json(base64.b64encode(content).decode(), headers=headers)


async def _form_image(request: Request) -> tuple[bytes | str, str | None]:
    """Picture and type of a multipart call; the picture may also be a text field."""
    async with form_of(request) as form:
        image, kind = form.get("image"), form.get("image_type")
        if image is None:
            raise RequestValidationError([_NO_IMAGE])
        content = await image.read() if isinstance(image, UploadFile) else image
    return content, kind if isinstance(kind, str) else None


def _kind(text: str) -> str:
    """The kind of description.

    Raises:
        InvalidRequest: neither of the two.
    """
    kind = _KINDS.get(text.strip().lower())
    if kind is None:
        raise InvalidRequest("image_type", "must be Photo or Anime", text)
    return kind


def _input_path(api: Api, request: Request, image: bytes | str) -> str:
    """The stored picture of a tool call; blocks.

    Raises:
        UnreadableImage: none was sent, or it cannot be read.
    """
    sources = api.sources(request)
    read = read_image(image, field="image", sources=sources)
    if read is None:
        raise UnreadableImage("image", "A picture is required.", image if isinstance(image, str) else None)
    root = api.services.settings.paths.outputs
    return str(root / store_input(read, root))


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
