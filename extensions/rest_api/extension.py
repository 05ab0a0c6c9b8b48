"""The REST API as an extension: flags, routes, life."""

import argparse
from typing import Any

from extensions.rest_api.api import Api
from extensions.rest_api.app import LINKABLE, PUBLIC, SIGNED, build_app, segments_of
from modules.events import Event
from modules.extensions import Extension, Routes, Services
from modules.flags import count
from modules.jobs import Job
from modules.start_time import without_pydantic_v1


class RestApi(Extension):
    """Every endpoint of docs/api.md."""

    name = "rest_api"

    def __init__(self) -> None:
        self._api: Api | None = None

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Limits that only API callers meet."""
        parser.add_argument(
            "--rate-limit", type=count, default=0, metavar="N",
            help="Requests per minute, for each key or address, that start or change something; 0 is no limit.",
        )  # fmt: skip
        parser.add_argument(
            "--key-queue-limit", type=count, default=0, metavar="N",
            help="Tasks of one API key that may wait; 0 is no limit.",
        )  # fmt: skip

    def mount(self, services: Services) -> Routes:
        """All routes of the API."""
        self._api = Api(services)
        with without_pydantic_v1():
            app = build_app(self._api)
        segments = segments_of(app)
        return Routes(
            app=app,
            segments=segments,
            linkable=LINKABLE & segments,
            public=PUBLIC,
            signed=SIGNED & segments,
            always=frozenset(path.strip("/") for path in PUBLIC),
        )

    def schema(self, services: Services) -> dict[str, Any]:
        """The OpenAPI schema of a server with these services, without serving."""
        api = Api(services)
        try:
            return build_app(api).openapi()
        finally:
            api.close()

    async def start(self, services: Services) -> None:
        """Deliver the webhooks an earlier server left."""
        if self._api is not None:
            await self._api.outbox.start()

    def on_event(self, job: Job, event: Event) -> None:
        """Measure, and deliver a webhook when a task ends."""
        if self._api is not None:
            self._api.on_event(job, event)

    async def stop(self) -> None:
        """End the delivery; what is not delivered stays in the outbox."""
        if self._api is not None:
            await self._api.outbox.stop()
            self._api.close()
