"""A server on real sockets, inside the test's loop."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from extensions.rest_api.extension import RestApi
from modules.extensions import Extension, Services
from modules.serving import Page, Server, assemble, bind
from modules.settings import Settings
from tests.fakes import FakeEngine
from tests.rest.conftest import ROOT, make_services


@dataclass
class Live:
    """What a test needs of it."""

    services: Services
    engine: FakeEngine
    server: Server
    page_url: str
    api_url: str


@asynccontextmanager
async def live_server(
    tmp_path: Path, *flags: str, page: Page | Callable[[Services], Page] | None = None, more: Sequence[Extension] = ()
) -> AsyncIterator[Live]:
    """Serve on two free ports of loopback until the context ends, then shut down as a signal would."""
    rest = RestApi()
    tmp_path.mkdir(exist_ok=True)
    if not (tmp_path / "presets").exists():
        (tmp_path / "presets").symlink_to(ROOT / "presets")
    settings = Settings.load(
        ["--port", "0", "--temp-path", str(tmp_path / "temp"), *flags],
        env={},
        root=tmp_path,
        extra=[one.add_arguments for one in (rest, *more)],
    )
    settings.prepare()
    settings, listeners = bind(settings)
    services, engine, _check, history = make_services(settings)
    page = page(services) if callable(page) else page
    ready = asyncio.Event()
    application = assemble(services, [rest, *more], page=page, api_ports=listeners.api_ports)
    server = Server(application, on_ready=ready.set)
    serving = asyncio.create_task(server._serve(listeners.sockets))
    await ready.wait()
    try:
        yield Live(
            services, engine, server,
            f"http://127.0.0.1:{settings.webui_port}", f"http://127.0.0.1:{settings.api_port}",
        )  # fmt: skip
    finally:
        server.should_exit = True
        await serving
        history.close()
