"""`/outputs` and `/inputs`: pictures as they are stored, or in the format that Accept asks for."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse

from extensions.rest_api.accept import file_format
from extensions.rest_api.api import Api, ApiDep
from extensions.rest_api.routing import statuses
from modules.errors import FocaleError
from modules.images import FILE_FORMATS, MEDIA_TYPES, file_as, url_path_file

router = APIRouter(tags=["files"])

_PICTURE = {"schema": {"type": "string", "format": "binary"}}
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The picture, converted if Accept is exactly one of these types",
        "content": dict.fromkeys(sorted(set(MEDIA_TYPES.values())), _PICTURE),
    },
    206: {"description": "A part of the file, for Range"},
    304: {"description": "Not changed"},
    416: {"description": "The range lies outside the file"},
    400: {"description": "The Range header cannot be read"},
    **statuses(404, empty_404=True),
}


@router.get("/outputs/{date}/{file}", operation_id="get_output", summary="A result", responses=_ANSWERS)
async def get_output(date: str, file: str, request: Request, api: ApiDep) -> Response:
    """A result by its date folder and name."""
    return await picture(f"outputs/{date}/{file}", request, api)


@router.get("/inputs/{file}", operation_id="get_input", summary="A picture that was sent", responses=_ANSWERS)
async def get_input(file: str, request: Request, api: ApiDep) -> Response:
    """A stored input picture by its hash."""
    return await picture(f"inputs/{file}", request, api)


@router.head("/outputs/{date}/{file}", include_in_schema=False)
async def head_output(date: str, file: str, request: Request, api: ApiDep) -> Response:
    """Headers of a result."""
    return await picture(f"outputs/{date}/{file}", request, api)


@router.head("/inputs/{file}", include_in_schema=False)
async def head_input(file: str, request: Request, api: ApiDep) -> Response:
    """Headers of an input."""
    return await picture(f"inputs/{file}", request, api)


@router.api_route("/outputs", methods=["GET", "HEAD"], include_in_schema=False)
@router.api_route("/inputs", methods=["GET", "HEAD"], include_in_schema=False)
@router.api_route("/outputs/{rest:path}", methods=["GET", "HEAD"], include_in_schema=False)
@router.api_route("/inputs/{rest:path}", methods=["GET", "HEAD"], include_in_schema=False)
async def no_such_file(rest: str = "") -> Response:
    """Anything else below the two folders."""
    return Response(status_code=404)


async def picture(path: str, request: Request, api: Api) -> Response:
    """The picture of a URL path, or an empty 404; never a file outside the output folder."""
    root = api.services.settings.paths.outputs
    found = await asyncio.to_thread(url_path_file, path, root)
    if found is None:
        return Response(status_code=404)
    stored_as = found.suffix.lower().lstrip(".")
    wanted = file_format(request.headers.get("accept", ""))
    if wanted is None or FILE_FORMATS[wanted] == FILE_FORMATS[stored_as]:
        return FileResponse(found, media_type=MEDIA_TYPES[stored_as], headers={"Vary": "Accept"})
    try:
        content = await asyncio.to_thread(file_as, found, wanted)
    except FocaleError:
        return Response(status_code=404)
    return Response(content, media_type=MEDIA_TYPES[wanted], headers={"Vary": "Accept"})
