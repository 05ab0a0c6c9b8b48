"""Puts off work of libraries that a starting server does not need yet."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import BaseModel


@contextmanager
def models_built_at_first_use() -> Iterator[None]:
    """Pydantic models declared within build their validators at first use (`defer_build`).

    For libraries that declare many models at import: FastAPI's description of OpenAPI alone takes a tenth of the
    time a server needs to start, and only `/openapi.json` uses it.
    """
    before = BaseModel.model_config
    BaseModel.model_config = {**before, "defer_build": True}
    try:
        yield
    finally:
        BaseModel.model_config = before


@contextmanager
def without_pydantic_v1() -> Iterator[None]:
    """Nothing within may import `pydantic.v1`, unless it is there already.

    FastAPI imports that copy of the old library at the first route, only to say that its models are not supported.
    """
    if "pydantic.v1" in sys.modules:
        yield
        return
    sys.modules["pydantic.v1"] = None  # type: ignore[assignment]  # makes an import fail as if it were not installed
    try:
        yield
    finally:
        del sys.modules["pydantic.v1"]
