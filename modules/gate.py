"""The gate before everything the server answers: cross-site rule, keys, limits, security headers, access log.

Pure ASGI: it decides before a byte of the body is read, and it knows neither routes nor page.
"""

import hmac
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Literal
from urllib.parse import parse_qs, quote, urlsplit

from modules.extensions import AsgiApp, Message, Receive, Routes, Scope, Send
from modules.limits import TokenBuckets
from modules.login_page import LOGIN_PATH, local_target, login_page
from modules.settings import Credential, Settings, is_loopback
from modules.signing import UrlSigner, session_key, sign_session

logger = logging.getLogger(__name__)
access_log = logging.getLogger("focale.access")

GRADIO_LOGIN = "/login"  # where clients of Gradio log in
COOKIE = "focale_session"
SESSION_S = 30 * 86_400
MAX_LOGIN_BYTES = 8_192
FAILURES_PER_MINUTE = 30
ANONYMOUS = ""

SECURITY_HEADERS: tuple[tuple[bytes, bytes], ...] = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
    (b"x-frame-options", b"SAMEORIGIN"),
)

# What the page's framework says about other sites; the gate has decided already.
_CORS_OF_APP = (b"access-control-allow-origin", b"access-control-allow-credentials")

Verdict = Literal["allowed", "refused", "absent"]


@dataclass(frozen=True, kw_only=True)
class GateRules:
    """What the gate enforces.

    keys: API key → name for logs and limits; empty leaves open what extensions own.
    persons: who may log in to the page; with neither keys nor persons all is open.
    secret: signs login cookies.
    cors_origins: origins of web pages that may call; `*` and `null` count.
    trusted_hosts: host names this server answers to, besides loopback names; None answers to any.
    max_body_bytes: larger request bodies are 413.
    rate_per_minute: requests per key and minute that change something; 0 is no limit.
    """

    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    persons: tuple[Credential, ...] = field(default=(), repr=False)
    secret: bytes = field(default=b"", repr=False)
    cors_origins: tuple[str, ...] = ()
    trusted_hosts: frozenset[str] | None = None
    max_body_bytes: int = 100 * 2**20
    rate_per_minute: int = 0

    @classmethod
    def of(cls, settings: Settings, secret: bytes) -> "GateRules":
        """The rules that the settings ask for."""
        rate = settings.extra.get("rate_limit", 0)
        return cls(
            keys=named_keys(settings.api_keys, settings.apikey),
            persons=() if settings.nowebui else settings.logins,
            secret=secret,
            cors_origins=settings.cors_origins or (("*",) if settings.api_keys else ()),
            trusted_hosts=_trusted_hosts(settings),
            max_body_bytes=settings.web_upload_size * 2**20,
            rate_per_minute=rate if isinstance(rate, int) else 0,
        )


def named_keys(api_keys: Sequence[str], command_line_key: str) -> dict[str, str]:
    """API key → its name; a line of the key file is the key and, after a space, the name it has in logs."""
    keys: dict[str, str] = {}
    for number, line in enumerate(api_keys, 1):
        if line == command_line_key:
            keys[line] = "apikey"
            continue
        key, _space, name = line.partition(" ")
        keys[key] = name.strip() or f"key-{number}"
    return keys


def _trusted_hosts(settings: Settings) -> frozenset[str] | None:
    """Names a browser may have used to get here; anything else is DNS rebinding.

    Only a server for this machine alone, without a key, depends on it: elsewhere the key protects, or all is open.
    """
    if settings.api_keys or not settings.listens_on_loopback or settings.share or settings.trusted_proxies:
        return None
    named = [settings.base_url, *settings.cors_origins]
    return frozenset(host for url in named if (host := _host_of(url if "//" in url else f"//{url}")))


class Gate:
    """Wraps the whole application."""

    def __init__(
        self,
        app: AsgiApp,
        rules: GateRules,
        *,
        owners: Mapping[str, Routes],
        signer: UrlSigner,
        api_ports: frozenset[int] = frozenset(),
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Guard `app`.

        Args:
            owners: first path segment → routes of extensions; what is not in it belongs to the page.
            api_ports: ports where there is no page.
        """
        self._app = app
        self._api_ports = api_ports
        self._rules = rules
        self._owners = owners
        self._signer = signer
        self._rates = TokenBuckets(rules.rate_per_minute, clock_s)
        self._failures = TokenBuckets(FAILURES_PER_MINUTE, clock_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or let through."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, receive, send)
        try:
            await self._decide(visit)
        finally:
            visit.log()

    async def _decide(self, visit: "_Visit") -> None:
        """Run through the rules; the first that objects answers."""
        rules = self._rules
        if rules.trusted_hosts is not None and not _is_trusted(visit.host, rules.trusted_hosts):
            await visit.refuse(403, _WRONG_HOST.format(host=visit.host[:100]))
            return
        cross_site = self._cross_site(visit)
        if cross_site == "refused":
            origin = visit.origin or "another site"
            await visit.refuse(403, _CROSS_SITE.format(origin=origin[:200]))
            return
        if cross_site == "allowed":
            visit.allow_origin(visit.origin)
            if visit.is_preflight:
                await visit.answer_preflight()
                return
        if self._is_guarded(visit) and not await self._authenticate(visit):
            return
        limited = visit.method not in ("GET", "HEAD", "OPTIONS")
        if limited and (wait_s := self._rates.take(visit.key_name or visit.client)):
            await visit.refuse(429, "Too many requests; try again later.", ((b"retry-after", b"%d" % wait_s),))
            return
        await visit.pass_on(self._app, rules.max_body_bytes)

    # -- cross-site requests ------------------------------------------------------------------------------------

    def _cross_site(self, visit: "_Visit") -> Verdict:
        """Whether a web page of another site asks, and may; `absent` when no page of another site does."""
        origin = visit.origin
        if not origin:
            return "refused" if self._is_foreign_without_origin(visit) else "absent"
        allowed = self._rules.cors_origins
        same_host = _host_of(origin) == visit.host and bool(visit.host)
        local = not self._rules.keys and is_loopback(_host_of(origin))
        if "*" in allowed or origin.lower() in {one.lower().rstrip("/") for one in allowed} or same_host or local:
            return "allowed"
        return "refused"

    def _is_foreign_without_origin(self, visit: "_Visit") -> bool:
        """True for `<img>`, links and the like on another site, unless the origins or the path allow it."""
        if visit.header(b"sec-fetch-site") != "cross-site" or "*" in self._rules.cors_origins:
            return False
        referrer = visit.header(b"referer")
        if referrer and not self._rules.keys and is_loopback(_host_of(referrer)):
            return False
        navigates = visit.header(b"sec-fetch-mode") == "navigate" and visit.method in ("GET", "HEAD")
        return not (navigates and self._is_linkable(visit))

    def _is_linkable(self, visit: "_Visit") -> bool:
        routes = self._owners.get(visit.segment)
        return routes is None or visit.segment in routes.linkable

    # -- keys and persons -----------------------------------------------------------------------------------------

    def _is_guarded(self, visit: "_Visit") -> bool:
        """Keys guard everything; persons alone guard the page, for the API knows no persons."""
        if self._rules.keys or not self._rules.persons:
            return bool(self._rules.keys)
        port = (visit.scope.get("server") or ("", 0))[1]
        return visit.segment not in self._owners and port not in self._api_ports

    async def _authenticate(self, visit: "_Visit") -> bool:
        """True to let the request through; otherwise it has been answered."""
        by_client = bool(self._rules.persons) and visit.path == GRADIO_LOGIN and visit.method == "POST"
        if (visit.path == LOGIN_PATH or by_client) and visit.scope["type"] == "http":
            await self._login(visit)
            return False
        routes = self._owners.get(visit.segment)
        if routes is not None and visit.path in routes.public:
            return True
        name, was_tried = self._presented(visit)
        if name is not None:
            visit.key_name = name
            return True
        readable = visit.method in ("GET", "HEAD")
        signed = routes is not None and readable and visit.segment in routes.signed
        if signed and self._signer.accepts(visit.path, visit.scope.get("query_string", b"")):
            visit.key_name = "signed URL"
            return True
        if was_tried and (wait_s := self._failures.take(visit.client)):
            await visit.refuse(429, "Too many wrong keys; try again later.", ((b"retry-after", b"%d" % wait_s),))
        elif readable and self._is_linkable(visit) and "text/html" in visit.header(b"accept"):
            target = visit.path if not visit.query else f"{visit.path}?{visit.query}"
            await visit.redirect(f"{LOGIN_PATH}?next={quote(target, safe='/')}")
        else:
            await visit.refuse(403, "Forbidden")
        return False

    def _presented(self, visit: "_Visit") -> tuple[str | None, bool]:
        """Name of the key or person that a request proves to come from, and whether a key stood in a header."""
        bearer = visit.header(b"authorization")
        given = [visit.header(b"x-api-key"), bearer[7:].strip() if bearer[:7].lower() == "bearer " else ""]
        for key in filter(None, given):
            if (known := self._known(key.encode("latin-1"))) is not None:  # the bytes that were sent
                return self._rules.keys[known], True
        cookie = _cookie(visit.header(b"cookie"), COOKIE) if self._cookie_counts(visit) else ""
        names = dict(self._rules.keys)
        if visit.segment not in self._owners:
            names |= {_identity(person): person.user for person in self._rules.persons}
        if cookie and (identity := session_key(self._rules.secret, cookie, names)) is not None:
            return names[identity], True
        return None, any(given)

    def _cookie_counts(self, visit: "_Visit") -> bool:
        """False when a page of another origin makes the browser ask; SameSite alone lets other ports of a host pass."""
        if visit.origin:
            return urlsplit(visit.origin).netloc == visit.header(b"host").lower()
        if visit.header(b"sec-fetch-site") in ("", "same-origin", "none"):
            return True
        return visit.header(b"sec-fetch-mode") == "navigate" and self._is_linkable(visit)

    def _known(self, key: bytes) -> str | None:
        """The configured key whose UTF-8 bytes are `key`; compares with every one, in constant time."""
        found = None
        for known in self._rules.keys:
            if hmac.compare_digest(known.encode(), key):
                found = known
        return found

    async def _login(self, visit: "_Visit") -> None:
        """Turn a key, or a name and password, into a cookie."""
        target = local_target(parse_qs(visit.query).get("next", ["/"])[0])
        if visit.method in ("GET", "HEAD"):
            await self._ask(visit, target)
            return
        if visit.method != "POST":
            await visit.refuse(405, "Method Not Allowed", ((b"allow", b"GET, POST"),))
            return
        body = await visit.read_body(MAX_LOGIN_BYTES)
        if body is None:
            await visit.refuse(413, "Content Too Large")
            return
        form = parse_qs(body.decode("utf-8", "replace"), max_num_fields=10)
        identity = self._recognised({name: values[0] for name, values in form.items()})
        if identity is None:
            if wait_s := self._failures.take(visit.client):
                problem = f"Too many wrong tries. Try again in {wait_s} seconds."
                await self._ask(visit, target, 429, problem, ((b"retry-after", b"%d" % wait_s),))
                return
            await self._ask(visit, target, 403, "This is not known here.")
            return
        session = sign_session(self._rules.secret, identity, int(time.time()) + SESSION_S)
        secure = "; Secure" if visit.scope.get("scheme") == "https" else ""
        cookie = f"{COOKIE}={session}; Path=/; Max-Age={SESSION_S}; HttpOnly; SameSite=Strict{secure}"
        headers = ((b"set-cookie", cookie.encode()),)
        if visit.path == GRADIO_LOGIN:
            await visit.answer(200, b'{"success":true}', b"application/json", headers)
        else:
            await visit.redirect(target, headers)

    async def _ask(
        self,
        visit: "_Visit",
        target: str,
        status: int = 200,
        problem: str = "",
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> None:
        """Show the login page."""
        rules = self._rules
        page = login_page(target, asks_key=bool(rules.keys), asks_person=bool(rules.persons), problem=problem)
        await visit.answer(status, page, b"text/html; charset=utf-8", headers)

    def _recognised(self, form: Mapping[str, str]) -> str | None:
        """What a session is signed for: the key or the person a filled form names; None for a wrong one."""
        key = self._known(form.get("key", "").strip().encode("utf-8", "replace"))
        if key is not None:
            return key
        name, password = form.get("username", "").strip(), form.get("password", "")
        accepted = [person for person in self._rules.persons if person.accepts(name, password)]
        return _identity(accepted[0]) if accepted else None


def _identity(person: Credential) -> str:
    """What a person's session is signed for; it ends when the password changes, and is never an API key."""
    return f"person\0{person.user}\0{person.sha256.lower()}"


class _Visit:
    """One request on its way through the gate."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self._receive = receive
        self._send = send
        self._headers: dict[bytes, bytes] = {}
        for name, value in scope.get("headers", ()):
            self._headers.setdefault(bytes(name).lower(), bytes(value))
        self.path: str = scope["path"]
        self.segment = self.path.split("/", 2)[1] if "/" in self.path else self.path
        self.method: str = scope.get("method", "GET")
        self.query = bytes(scope.get("query_string", b"")).decode("latin-1")
        self.client = (scope.get("client") or ("unknown", 0))[0]
        self.host = _host_of("//" + self.header(b"host"))
        self.origin = self.header(b"origin").lower().rstrip("/")
        self.key_name = ANONYMOUS
        self.request_id = secrets.token_hex(8)
        self._extra: list[tuple[bytes, bytes]] = [*SECURITY_HEADERS, (b"x-request-id", self.request_id.encode())]
        self._cors = False
        self._status = 0
        self._began_s = time.perf_counter()

    def header(self, name: bytes) -> str:
        """A request header as text, "" when absent."""
        return self._headers.get(name, b"").decode("latin-1")

    @property
    def is_preflight(self) -> bool:
        """True for the question a browser asks before a cross-origin request."""
        return self.method == "OPTIONS" and b"access-control-request-method" in self._headers

    def allow_origin(self, origin: str) -> None:
        """Let the page of this origin read the answer; without cookies, which it could abuse."""
        self._cors = True
        exposed = b"X-Task-Id, X-Seed, X-Ignored-Fields, X-Request-Id, Retry-After"
        self._extra += [
            (b"access-control-allow-origin", self._headers.get(b"origin", origin.encode())),
            (b"access-control-expose-headers", exposed),
            (b"vary", b"Origin"),
        ]

    async def answer_preflight(self) -> None:
        """Allow what the browser asks for."""
        headers: list[tuple[bytes, bytes]] = [
            (b"access-control-allow-methods", b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"),
            (b"access-control-max-age", b"600"),
        ]
        if asked := self._headers.get(b"access-control-request-headers"):
            headers.append((b"access-control-allow-headers", asked))
        if b"access-control-request-private-network" in self._headers:
            headers.append((b"access-control-allow-private-network", b"true"))
        await self.answer(200, b"OK", b"text/plain; charset=utf-8", headers)

    async def refuse(self, status: int, detail: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """Answer with the JSON body that all errors have."""
        if self.scope["type"] == "websocket":
            await self._send({"type": "websocket.close", "code": 1008, "reason": detail[:120]})
            return
        body = json.dumps({"detail": detail}, ensure_ascii=False, separators=(",", ":")).encode()
        await self.answer(status, body, b"application/json", headers)

    async def redirect(self, target: str, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """Send the browser to another page with a GET."""
        await self.answer(303, b"", b"text/plain", [*headers, (b"location", target.encode("latin-1", "replace"))])

    async def answer(
        self, status: int, body: bytes, content_type: bytes, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        """A whole answer from the gate itself."""
        length = b"%d" % len(body)
        fixed = [(b"content-type", content_type), (b"content-length", length), (b"cache-control", b"no-store")]
        await self._send_marked({"type": "http.response.start", "status": status, "headers": [*fixed, *headers]})
        content = b"" if self.method == "HEAD" else body
        await self._send_marked({"type": "http.response.body", "body": content, "more_body": False})

    async def read_body(self, limit: int) -> bytes | None:
        """The whole body, or None when it is longer than `limit` bytes."""
        body = b""
        while True:
            message = await self._receive()
            body += bytes(message.get("body", b""))
            if len(body) > limit:
                return None
            if not message.get("more_body", False):
                return body

    async def pass_on(self, app: AsgiApp, max_body_bytes: int) -> None:
        """Call the application with marked answers and a body that ends at the limit."""
        state = self.scope.setdefault("state", {})
        state["request_id"], state["key_name"] = self.request_id, self.key_name
        if self.scope["type"] == "websocket":
            await app(self.scope, self._receive, self._send)
            return
        length = self.header(b"content-length")
        if length.isascii() and length.isdecimal() and int(length) > max_body_bytes:
            await self.refuse(413, _TOO_LARGE.format(limit=max_body_bytes // 2**20))
            return
        body = _LimitedBody(self._receive, max_body_bytes)
        await app(self.scope, body.receive, self._until_too_large(body, max_body_bytes))

    def _until_too_large(self, body: "_LimitedBody", limit: int) -> Callable[[Message], Awaitable[None]]:
        """A `send` that answers 413 in place of whatever the application says about a cut body."""

        async def send(message: Message) -> None:
            if body.exceeded and self._status == 0:
                await self.refuse(413, _TOO_LARGE.format(limit=limit // 2**20))
            elif not body.exceeded:
                await self._send_marked(message)

        return send

    async def _send_marked(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            kept = [
                (name, value)
                for name, value in message.get("headers", ())
                if not (self._cors and name.lower() in _CORS_OF_APP)
            ]
            present = {name.lower() for name, _value in kept}
            added = [(name, value) for name, value in self._extra if name == b"vary" or name not in present]
            message = {**message, "headers": [*kept, *added]}
        await self._send(message)

    def log(self) -> None:
        """One line per request; the query is left out, because signatures and names may stand in it."""
        level = logging.DEBUG if self.method in ("GET", "HEAD", "OPTIONS") and self._status < 400 else logging.INFO
        access_log.log(
            level,
            "request=%s client=%s key=%s %s %s status=%d ms=%.1f",
            self.request_id,
            self.client,
            self.key_name.replace(" ", "_") or "-",
            self.method,
            quote(self.path, safe="/-_.~:@*+")[:300],
            self._status,
            (time.perf_counter() - self._began_s) * 1000,
        )


class _LimitedBody:
    """A request body that ends as if the client had gone once it is longer than allowed."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._left = limit
        self.exceeded = False

    async def receive(self) -> Message:
        """The next message, counted."""
        if self.exceeded:
            return {"type": "http.disconnect"}
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.exceeded = True
            return {"type": "http.disconnect"}
        return message


_CROSS_SITE = (
    "A web page of {origin} may not use this server. "
    "If it should, start Focale with --cors-origins and that origin; a page opened from disk has the origin null."
)
_WRONG_HOST = (
    "This server answers on this machine only and is not known as {host!r}. "
    "Use http://127.0.0.1, or name the host with --base-url."
)
_TOO_LARGE = "The request is larger than {limit} MiB; --web-upload-size sets the limit."


def _is_trusted(host: str, trusted: frozenset[str]) -> bool:
    """An empty host is an old HTTP/1.0 client and no browser."""
    return not host or is_loopback(host) or host in trusted


def _host_of(url: str) -> str:
    """The host name in a URL, lower case and without brackets; "" when there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _cookie(header: str, name: str) -> str:
    if not header:
        return ""
    try:
        morsel = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return morsel.value if morsel else ""
