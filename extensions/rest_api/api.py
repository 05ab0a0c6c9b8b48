"""What the routes share: the services, the request model with the configured defaults, and the API's own helpers."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Request

from extensions.rest_api import legacy_replies
from extensions.rest_api.bodies import request_model
from extensions.rest_api.eta import EtaMeter
from extensions.rest_api.fetching import Fetcher
from extensions.rest_api.live import TaskEvents
from extensions.rest_api.metrics import Metrics
from extensions.rest_api.places import Places
from extensions.rest_api.quota import KeyQuota
from extensions.rest_api.shown import ShownRecords
from extensions.rest_api.webhook import Outbox, WebhookSender, WebhookStyle
from extensions.rest_api.wire import Previews, Wire, base_of
from modules.events import Event
from modules.extensions import Services
from modules.images import ImageSources
from modules.jobs import Job
from modules.record import Record
from modules.request import GenerationRequest

BLOCKING_CALLS = 8
T = TypeVar("T")


@dataclass
class Api:
    """One instance per server; routes get it through `ApiDep`."""

    services: Services
    request_model: type[GenerationRequest] = field(init=False)
    eta: EtaMeter = field(init=False)
    previews: Previews = field(init=False)
    events: TaskEvents = field(init=False)
    metrics: Metrics = field(init=False)
    places: Places = field(init=False)
    shown: ShownRecords = field(init=False)
    quota: KeyQuota = field(init=False)
    outbox: Outbox = field(init=False)

    def __post_init__(self) -> None:
        settings = self.services.settings
        self.request_model = request_model(settings.request_defaults())
        self.eta = EtaMeter(self.services.jobs)
        self.previews = Previews()
        self.events = TaskEvents(self.eta, self.previews)
        self.metrics = Metrics(self.services.jobs)
        self.places = Places(self.services.jobs)
        self.shown = ShownRecords()
        limit = settings.extra.get("key_queue_limit", 0)
        self.quota = KeyQuota(self.services.jobs, limit if isinstance(limit, int) else 0)
        self._fetcher = Fetcher.of(settings)
        self._threads = ThreadPoolExecutor(BLOCKING_CALLS, thread_name_prefix="focale-rest")
        sender = WebhookSender(self._fetcher.post, secret=settings.webhook_secret)
        self.outbox = Outbox(
            settings.paths.outputs / "webhooks",
            send=sender,
            find=self.services.history.get,
            body=self._webhook_body,
        )

    def wire(self, request: Request | None) -> Wire:
        """The translation for one caller; None for a webhook, which nobody asked for."""
        settings = self.services.settings
        asked = base_of(request, trust_forwarded=bool(settings.trusted_proxies)) if request else None
        return Wire(settings.result_base(asked), self.services.signer)

    def sources(self, request: Request) -> ImageSources:
        """Where the picture values of this caller may lead."""
        settings = self.services.settings
        ports = {settings.webui_port, settings.api_port}
        local = [f"http://{host}:{port}" for host in ("127.0.0.1", "localhost") for port in sorted(ports)]
        return ImageSources(
            output_root=settings.paths.outputs,
            own_bases=[self.wire(request).base, *local],
            fetch=self._fetcher.image,
        )

    def _webhook_body(self, record: Record, style: WebhookStyle) -> dict[str, Any]:
        wire = self.wire(None)
        return legacy_replies.webhook_body(record, wire) if style == "legacy" else wire.record(record)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run something that fetches or decodes; slow strangers then never hold up the history or the page."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """End the threads; what they wait for is not waited for."""
        self.metrics.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def on_event(self, job: Job, event: Event) -> None:
        """Something happened to a task."""
        self.eta.on_event(job, event)
        self.places.on_event(job, event)
        self.metrics.on_event(job, event)
        self.quota.on_event(job, event)
        self.outbox.on_event(job, event)


async def _api_of(request: Request) -> Api:
    """What the routes share. Asynchronous, because the framework sends plain functions to a thread at each request."""
    api: Api = request.app.state.api
    return api


ApiDep = Annotated[Api, Depends(_api_of)]


async def _wire_of(request: Request, api: ApiDep) -> Wire:
    return api.wire(request)


WireDep = Annotated[Wire, Depends(_wire_of)]


def key_name_of(request: Request) -> str:
    """Name of the API key the caller showed; "" without keys."""
    name: str = request.scope.get("state", {}).get("key_name", "")
    return name
