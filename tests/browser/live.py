"""A real server on free ports, in a thread of the test's process; its engine is a fake or the embedded model."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from extensions.rest_api.extension import RestApi
from modules import serving
from modules.assembly import build_services
from modules.events import Event, Failed, ImageSaved
from modules.extensions import Services
from modules.jobs import Job
from modules.settings import Settings
from modules.ui.page import build_page
from tests.fakes import FakeEngine
from tests.rest.conftest import make_services

ROOT = Path(__file__).resolve().parents[2]
START_S = 60


@dataclass
class Live:
    """A server that answers. engine: the fake one, None with the embedded model."""

    services: Services
    engine: FakeEngine | None
    page_url: str
    api_url: str
    loop: asyncio.AbstractEventLoop

    @property
    def outputs(self) -> Path:
        """Where the server writes."""
        return self.services.settings.paths.outputs

    def call(self, act: Callable[[], object]) -> None:
        """Run something in the server's loop, and wait until it is done."""
        done = threading.Event()
        self.loop.call_soon_threadsafe(lambda: (act(), done.set()))
        assert done.wait(10)

    def hold(self, at_step: int, *, after_pictures: int = 0) -> None:
        """Make runs wait before this step, of the pictures after the next `after_pictures`."""
        if not after_pictures:
            self.call(lambda: self.engine.hold(at_step))
            return

        def hold_then(job: Job, event: Event) -> None:
            nonlocal after_pictures
            after_pictures -= isinstance(event, ImageSaved)
            if isinstance(event, ImageSaved) and after_pictures == 0:
                self.engine.hold(at_step)

        self.call(lambda: self.services.jobs.on_event(hold_then))

    def release(self) -> None:
        """Let runs go on."""
        self.call(self.engine.release)

    def fail(self, failure: Failed) -> None:
        """Make runs fail."""
        self.call(lambda: setattr(self.engine, "failure", failure))

    def settle(self) -> None:
        """Let runs go on and succeed, and wait until none is left."""

        async def idle() -> None:
            self.engine.failure = None
            self.engine.release()
            for job in filter(None, [self.services.jobs.running, *self.services.jobs.waiting]):
                async for _event in job.log.follow():
                    pass

        asyncio.run_coroutine_threadsafe(idle(), self.loop).result(30)


def load_settings(folder: Path, *flags: str) -> Settings:
    """Settings of a fresh program folder with the shipped presets and models, on free ports."""
    for name in ("presets", "models"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    rest = RestApi()
    return Settings.load(
        ["--port", "0", "--disable-in-browser", "--temp-path", str(folder / "temp"), *flags],
        env={"API_PORT": "0"},
        root=folder,
        extra=[rest.add_arguments],
    )


@contextmanager
def live_server(folder: Path, *flags: str, real: bool = False) -> Iterator[Live]:
    """Serve page and API until the block ends.

    Args:
        real: run the embedded model in a thread instead of the fake engine.
    """
    settings = load_settings(folder, *flags)
    settings.prepare()
    settings, listeners = serving.bind(settings)
    ready, made = threading.Event(), {}

    async def serve() -> None:
        if real:
            services, engine = build_services(settings, inline=True), None
        else:
            services, engine, _check, _history = make_services(settings)
        rest = RestApi()
        application = serving.assemble(
            services, [rest], page=build_page(services, [rest]), api_ports=listeners.api_ports
        )
        server = serving.Server(application, on_ready=ready.set)
        made.update(services=services, engine=engine, server=server, loop=asyncio.get_running_loop())
        server.install_signal_handlers = lambda: None
        try:
            await server.serve(sockets=listeners.sockets)
        finally:
            services.history.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="live-server")
    thread.start()
    try:
        assert ready.wait(START_S), "the server did not start"
        yield Live(
            services=made["services"],
            engine=made["engine"],
            page_url=f"http://127.0.0.1:{settings.webui_port}/",
            api_url=f"http://127.0.0.1:{settings.api_port}/",
            loop=made["loop"],
        )
    finally:
        if "server" in made:
            made["server"].should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"
