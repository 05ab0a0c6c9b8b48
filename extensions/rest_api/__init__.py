"""The REST API: one extension among others, built on what every extension is given."""

from modules.start_time import models_built_at_first_use, without_pydantic_v1

with models_built_at_first_use(), without_pydantic_v1():
    from extensions.rest_api.extension import RestApi


def extension() -> RestApi:
    """The extension that the loader takes up."""
    return RestApi()
