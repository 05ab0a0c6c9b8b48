"""One server on two ports: binds the sockets, sends each request to its owner, and ends everything in order."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

import uvicorn

from modules.errors import PortTaken
from modules.extensions import (
    AsgiApp,
    Extension,
    Message,
    Receive,
    Routes,
    Scope,
    Send,
    Services,
    owners,
    tell_extensions,
)
from modules.gate import Gate, GateRules
from modules.settings import Settings
from modules.state import ServerState

logger = logging.getLogger(__name__)

GRACE_S = 5
KEEP_ALIVE_S = 75  # uvicorn's own 5 s meet clients that poll every 5 s: some would find the connection just closed
BACKLOG = 2048

Lifespan: TypeAlias = Callable[[], AbstractAsyncContextManager[None]]


# -- sockets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Listeners:
    """Bound sockets; `settings` of `bind` tells their ports.

    page: of the page's port. api: of the API's own ports, none when they were taken.
    """

    page: socket.socket
    api: tuple[socket.socket, ...]

    @property
    def sockets(self) -> list[socket.socket]:
        """All of them."""
        return [self.page, *self.api]

    @property
    def api_ports(self) -> frozenset[int]:
        """Ports where `/` is not the page."""
        return frozenset(one.getsockname()[1] for one in self.api)


def bind(settings: Settings) -> tuple[Settings, Listeners]:
    """Bind both ports; the settings come back with the numbers the system gave where 0 was asked.

    A taken API port is logged, and the API answers on the page's port alone.

    Raises:
        PortTaken: the page's port cannot be had.
    """
    page = _bound(settings.listen, settings.webui_port)
    webui_port = page.getsockname()[1]
    wanted = [settings.api_port, settings.legacy_port]
    api: list[socket.socket] = []
    for port in wanted:
        if port is None or (port == webui_port and port):
            continue
        try:
            api.append(_bound(settings.listen, port))
        except PortTaken as error:
            logger.warning("%s The API answers on port %d as well.", error, webui_port)
    main = next((one for one in api if settings.api_port in (0, one.getsockname()[1])), None)
    api_port = main.getsockname()[1] if main else webui_port
    return replace(settings, webui_port=webui_port, api_port=api_port), Listeners(page, tuple(api))


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens nowhere yet, bound to the address.

    Raises:
        PortTaken: someone else has the port, or the address is not this machine's; one line that says what to do.
    """
    address = host.strip("[]")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    # With the protocol named, asyncio turns Nagle's algorithm off; else each answer waits 40 ms for an ACK.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        raise PortTaken(
            f"Port {port} of {host} cannot be used ({error.strerror or error}); "
            "end what uses it, or choose other ports with --port and API_PORT."
        ) from None
    made.setblocking(False)
    made.set_inheritable(False)
    return made


# -- dispatch -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Page:
    """The page as the server sees it.

    app: answers every path that no extension owns. lifespan: what must be entered while it serves.
    end_streams: tells its open streams to end; called first at shutdown.
    """

    app: AsgiApp
    lifespan: Lifespan
    end_streams: Callable[[], None]


class Front:
    """Sends a request to the extension that owns its first path segment, else to the page.

    The owner gets every method and every form of the path, so that 405, OPTIONS, HEAD and slashes are its business.
    """

    def __init__(
        self,
        *,
        owned: Mapping[str, Routes],
        page: AsgiApp | None,
        state: ServerState,
        api_ports: Callable[[], frozenset[int]],
        lifespan: Lifespan,
    ) -> None:
        """Dispatch between the owners and the page.

        Args:
            owned: first path segment → its routes.
            page: None with `--nowebui`.
            api_ports: ports where `/` leads to `/docs`.
            lifespan: entered before the first request, left after the last.
        """
        self._owned = owned
        self._page = page
        self._state = state
        self._api_ports = api_ports
        self._lifespan = lifespan
        self._in_work: set[asyncio.Task[object]] = set()
        self._ending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or run the server's life."""
        if scope["type"] == "lifespan":
            await _live(self._lifespan, receive, send)
            return
        task = asyncio.current_task()
        if task is None or self._is_ending():
            await _say(scope, send, 503, b'{"detail":"The server is shutting down"}')
            return
        self._in_work.add(task)
        answer = _Answer(send)
        try:
            await self._dispatch(scope, receive, answer.send)
        except asyncio.CancelledError:
            if not self._is_ending():
                raise
            await answer.finish(scope)
        finally:
            self._in_work.discard(task)

    def _is_ending(self) -> bool:
        return self._ending

    async def end_requests(self) -> None:
        """End every request in work: streams close cleanly, calls that wait for a task get 503."""
        self._ending = True
        in_work = [task for task in self._in_work if task is not asyncio.current_task()]
        for task in in_work:
            task.cancel()
        if in_work:
            await asyncio.wait(in_work, timeout=GRACE_S / 2)

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        segment = path.split("/", 2)[1] if path.startswith("/") else path
        routes = self._owned.get(segment)
        if routes is not None:
            if segment not in routes.always and not self._state.api_enabled:
                await _say(scope, send, 404, b'{"detail":"Not Found"}')
            else:
                await routes.app(scope, receive, send)
            return
        if self._page is not None and (scope.get("server") or ("", 0))[1] not in self._api_ports():
            await self._page(scope, receive, send)
        elif path == "/" and scope["type"] == "http" and scope["method"] in ("GET", "HEAD") and self._has_docs:
            await _say(scope, send, 307, b"", ((b"location", b"/docs"),))
        else:
            await _say(scope, send, 404, b'{"detail":"Not Found"}')

    @property
    def _has_docs(self) -> bool:
        return "docs" in self._owned and self._state.api_enabled


class _Answer:
    """Remembers how far an answer got, so that it can be ended well."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._has_begun = False
        self._is_over = False

    async def send(self, message: Message) -> None:
        """Pass a message on."""
        self._has_begun = True
        self._is_over = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def finish(self, scope: Scope) -> None:
        """End what was begun, or say that the server is going."""
        if not self._has_begun:
            detail = b'{"detail":"The server is shutting down; accepted tasks go on at its next start"}'
            await _say(scope, self._send, 503, detail)
        elif not self._is_over and scope["type"] == "http":
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def _say(scope: Scope, send: Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """A small answer of the server itself."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1001})
        return
    fixed = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
    content = b"" if scope.get("method") == "HEAD" else body
    await send({"type": "http.response.body", "body": content, "more_body": False})


async def _live(lifespan: Lifespan, receive: Receive, send: Send) -> None:
    """Answer the server's lifespan messages by entering and leaving the context."""
    await receive()
    began = False
    try:
        async with lifespan():
            began = True
            await send({"type": "lifespan.startup.complete"})
            await receive()
    except Exception as error:
        logger.exception("The server cannot %s", "end well" if began else "start")
        part = "shutdown" if began else "startup"
        await send({"type": f"lifespan.{part}.failed", "message": str(error)})
        return
    await send({"type": "lifespan.shutdown.complete"})


# -- the whole ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Application:
    """What serves: the ASGI application behind its gate, and what must be told before the end."""

    asgi: AsgiApp
    front: Front
    page: Page | None

    async def end_requests(self) -> None:
        """End all streams and waiting calls."""
        if self.page is not None:
            self.page.end_streams()
        await self.front.end_requests()


def assemble(
    services: Services,
    extensions: Sequence[Extension],
    *,
    page: Page | None = None,
    api_ports: frozenset[int] = frozenset(),
) -> Application:
    """Put gate, extensions and page together; nothing runs yet.

    Raises:
        ExtensionFailed: two extensions claim the same paths.
    """
    mounted = {one.name: routes for one in extensions if (routes := one.mount(services)) is not None}
    owned = owners(mounted)
    tell_extensions(extensions, services.jobs)
    front = Front(
        owned=owned,
        page=page.app if page else None,
        state=services.state,
        api_ports=lambda: api_ports,
        lifespan=lambda: _life(services, extensions, page),
    )
    rules = GateRules.of(services.settings, services.state.secret)
    gate = Gate(front, rules, owners=owned, signer=services.signer, api_ports=api_ports)
    return Application(asgi=gate, front=front, page=page)


@asynccontextmanager
async def _life(services: Services, extensions: Sequence[Extension], page: Page | None) -> AsyncIterator[None]:
    """Extensions start, then the queue takes up its tasks, then the page lives; ended in the opposite order."""
    async with AsyncExitStack() as stack:
        for extension in extensions:
            await extension.start(services)
            stack.push_async_callback(_stop_quietly, extension)
        if services.state.queue_paused:
            logger.warning("The queue was paused before this start: tasks are accepted, and wait until it is resumed.")
            services.jobs.pause()
        await services.jobs.start()
        stack.push_async_callback(services.jobs.close)
        if page is not None:
            await stack.enter_async_context(page.lifespan())
        yield


async def _stop_quietly(extension: Extension) -> None:
    """Stop an extension; its failure must not keep the others from ending."""
    try:
        await extension.stop()
    except Exception:
        logger.exception("Extension %s failed to stop", extension.name)


class Server(uvicorn.Server):
    """A uvicorn server that ends open streams before it waits for them."""

    def __init__(
        self,
        application: Application,
        *,
        trusted_proxies: Sequence[str] = (),
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        """Serve `application`.

        Args:
            trusted_proxies: addresses whose X-Forwarded headers tell scheme and client.
            on_ready: called once, when connections are accepted.
        """
        config = uvicorn.Config(
            application.asgi,
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=bool(trusted_proxies),
            forwarded_allow_ips=list(trusted_proxies),
            timeout_graceful_shutdown=GRACE_S,
            timeout_keep_alive=KEEP_ALIVE_S,
            ws="none",
            loop="asyncio",
        )
        super().__init__(config)
        self._application = application
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        await super().startup(sockets)
        if self.started and self._on_ready is not None:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End streams and waiting calls first: uvicorn would wait its whole grace period for them."""
        await self._application.end_requests()
        await super().shutdown(sockets)


def serve(
    application: Application,
    listeners: Listeners,
    *,
    trusted_proxies: Sequence[str] = (),
    on_ready: Callable[[], None] | None = None,
) -> bool:
    """Serve until a signal ends it; False when the server could not start."""
    server = Server(application, trusted_proxies=trusted_proxies, on_ready=on_ready)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn passes the signal on once all has ended
        asyncio.run(server.serve(sockets=listeners.sockets))
    return server.started
