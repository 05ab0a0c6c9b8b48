"""A whole server in process: real services, routes and gate; only the engine is a fake."""

import faulthandler
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from extensions.rest_api.extension import RestApi
from modules.extensions import Extension, Services
from modules.handlers import Handlers
from modules.history import History
from modules.jobs import JobQueue
from modules.provision import Provision
from modules.resources import Resources
from modules.serving import Application, Page, assemble
from modules.settings import Settings
from modules.signing import UrlSigner
from modules.state import ServerState
from tests.fakes import FakeEngine, NoCheck

ROOT = Path(__file__).resolve().parents[2]
API_PORT = 7866
BASE = f"http://127.0.0.1:{API_PORT}"


@dataclass
class Running:
    """A server that runs inside the test."""

    services: Services
    engine: FakeEngine
    check: NoCheck
    rest: RestApi
    application: Application
    client: httpx.AsyncClient
    history: History
    outputs: Path
    extra: dict[str, Any] = field(default_factory=dict)

    async def generate(self, body: dict[str, Any] | None = None, **options: Any) -> httpx.Response:
        """Post a generate call."""
        return await self.client.post("/v1/engine/generate/", json=body or {}, **options)

    async def accepted(self, body: dict[str, Any] | None = None) -> str:
        """Id of a task that was accepted."""
        reply = await self.generate({**(body or {}), "async_process": True})
        assert reply.status_code == 200, reply.text
        task_id: str = reply.json()["task_id"]
        return task_id

    async def ended(self, task_id: str) -> dict[str, Any]:
        """The record of a task after its end."""
        job = self.services.jobs.get(task_id)
        if job is not None:
            async for _event in job.log.follow():
                pass
        shown: dict[str, Any] = (await self.client.get(f"/tasks/{task_id}")).json()
        return shown


def make_services(settings: Settings) -> tuple[Services, FakeEngine, NoCheck, History]:
    """Services over a fake engine."""
    outputs = settings.paths.outputs
    history, engine, check = History(outputs, sync="never"), FakeEngine(outputs), NoCheck()
    resources = Resources(settings)
    # No test may reach the network; one that wants downloads names a mirror on this machine.
    provision = Provision(settings if settings.hf_mirror else replace(settings, offline=True), resources)
    jobs = JobQueue(engine, history, preparer=provision, limit=settings.queue_limit)
    state = ServerState(outputs / "settings_state.json")
    handlers = Handlers(
        queue=jobs, history=history, check=check, tools=engine, output_root=outputs,
        stop_when_abandoned=settings.on_disconnect == "stop",
    )  # fmt: skip
    services = Services(
        settings=settings, state=state, handlers=handlers, jobs=jobs, history=history,
        resources=resources, provision=provision,
        signer=UrlSigner(state.secret, enabled=bool(settings.api_keys)),
    )  # fmt: skip
    return services, engine, check, history


@asynccontextmanager
async def running_server(
    tmp_path: Path, *flags: str, page: Page | None = None, extensions: tuple[Extension, ...] = ()
) -> AsyncIterator[Running]:
    """A server with these flags; requests go through the gate."""
    rest = RestApi()
    if not (tmp_path / "presets").exists():
        (tmp_path / "presets").symlink_to(ROOT / "presets")
    settings = Settings.load(
        ["--port", str(API_PORT - 1), "--temp-path", str(tmp_path / "temp"), *flags],
        env={},
        root=tmp_path,
        extra=[rest.add_arguments],
    )
    settings.prepare()
    services, engine, check, history = make_services(settings)
    application = assemble(services, [rest, *extensions], page=page, api_ports=frozenset({API_PORT}))
    async with AsyncExitStack() as stack:
        stack.callback(history.close)
        await stack.enter_async_context(application.front._lifespan())
        transport = httpx.ASGITransport(application.asgi)
        client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url=BASE, timeout=20))
        yield Running(services, engine, check, rest, application, client, history, settings.paths.outputs)


@pytest.fixture(autouse=True)
def no_endless_waiting() -> Iterator[None]:
    """Ends the run, with every thread's stack, when a test waits for something that never comes."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


Serve = Callable[..., Awaitable[Running]]


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Start a server with flags; it ends with the test."""
    async with AsyncExitStack() as stack:

        async def start(*flags: str, **options: Any) -> Running:
            return await stack.enter_async_context(running_server(tmp_path, *flags, **options))

        yield start


@pytest.fixture
async def server(serve: Serve) -> Running:
    """A server without flags."""
    return await serve()
