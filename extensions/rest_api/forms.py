"""Reads multipart and urlencoded forms, and says what is wrong with broken ones."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

MAX_FIELDS = 500
MAX_FILES = 20
MAX_FIELD_BYTES = 64 * 2**20


@asynccontextmanager
async def form_of(request: Request) -> AsyncIterator[FormData]:
    """The form of a request; its files are closed at the end of the context.

    Raises:
        RequestValidationError: it is no form that can be read.
    """
    try:
        form = await request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES)
    except HTTPException as error:
        detail = {"type": "form_invalid", "loc": ["body"], "msg": str(error.detail), "input": None}
        raise RequestValidationError([detail]) from None
    try:
        yield form
    finally:
        await form.close()
