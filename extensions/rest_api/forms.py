"""Reads multipart and urlencoded forms, and says what is wrong with broken ones."""

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

MAX_FIELDS = 500
MAX_FILES = 20
MAX_FIELD_BYTES = 64 * 2**20


async def form_of(request: Request) -> FormData:
    """The form of a request; files are closed with the request.

    Raises:
        RequestValidationError: it is no form that can be read.
    """
    try:
        return await request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except HTTPException as error:
        detail = {"type": "form_invalid", "loc": ["body"], "msg": str(error.detail), "input": None}
        raise RequestValidationError([detail]) from None
