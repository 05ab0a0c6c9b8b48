"""The REST API: one extension among others, built on what every extension is given."""

from extensions.rest_api.extension import RestApi


def extension() -> RestApi:
    """The extension that the loader takes up."""
    return RestApi()
