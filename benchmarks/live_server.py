"""A whole server in this process for benchmarks: real routes, real socket, real worker, a folder of its own."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from modules import serving
from modules.assembly import build_services
from modules.extensions import Services, load_extensions
from modules.settings import Settings


@asynccontextmanager
async def live_server(outputs: Path, flags: Sequence[str] = ()) -> AsyncIterator[tuple[Services, str]]:
    """The services of a server without a page that writes to `outputs`, and its address."""
    loaded = load_extensions()
    argv = ["--nowebui", "--port", "0", "--output-path", str(outputs), *flags]
    settings, listeners = serving.bind(Settings.load(argv, extra=loaded.argument_adders()))
    services = build_services(settings)
    application = serving.assemble(services, loaded.extensions, api_ports=listeners.api_ports)
    ready = asyncio.Event()
    server = serving.Server(application, on_ready=ready.set)
    serving_task = asyncio.create_task(server.serve(sockets=listeners.sockets))
    try:
        await ready.wait()
        yield services, f"http://127.0.0.1:{settings.webui_port}"
    finally:
        server.should_exit = True
        await serving_task
        services.history.close()
