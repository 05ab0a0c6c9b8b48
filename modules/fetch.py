"""Contacts URLs that strangers name: pictures by GET, webhooks by POST, never an address that is off limits.

The address is checked where the socket is made: a name is resolved once, every answer must be acceptable, and the
checked address itself is dialled, so that no second look-up can lead elsewhere. Each redirect passes the same check.
"""

import ipaddress
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Final, TypeAlias
from urllib.parse import urljoin, urlsplit

import certifi
import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import HTTPError, NameResolutionError, NewConnectionError

from modules.errors import FetchRefused
from modules.images import MAX_IMAGE_BYTES

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
AddressInfo: TypeAlias = tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[Any, ...]]
Resolve: TypeAlias = Callable[[str, int], Sequence[AddressInfo]]

IMAGE_TIMEOUT_S: Final = 20.0
WEBHOOK_TIMEOUT_S: Final = 5.0
CONNECT_TIMEOUT_S: Final = 5.0
MAX_REDIRECTS: Final = 5
MAX_REPLY_BYTES: Final = 64 * 1024  # of a webhook's answer, which nobody reads
USER_AGENT: Final = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0 Focale"

_LOCAL: Final[tuple[Network, ...]] = tuple(
    ipaddress.ip_network(text)
    for text in ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7")
)
_CLOUD_METADATA: Final = frozenset(ipaddress.ip_address(text) for text in ("fd00:ec2::254", "fd20:ce::254"))
_CLOSED: Final[tuple[Network, ...]] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96",  # NAT64, 6to4, Teredo, v4-compatible
        "192.0.0.0/24", "192.88.99.0/24", "100.64.0.0/10", "198.18.0.0/15",  # older Pythons call some of them global
        "2001:2::/48", "2001:10::/28", "2001:20::/28", "2001:db8::/32", "3fff::/20", "5f00::/16", "fec0::/10",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """Which addresses may be contacted.

    allow_private: also loopback and private networks, for a server that only its own machine can reach.
    Link-local addresses (cloud metadata services) stay closed.
    allowed_hosts: what the operator opened besides: names (`nas.lan`, `*.lan`), with or without `:port`, addresses
    and networks (`192.168.1.0/24`).
    """

    allow_private: bool = False
    allowed_hosts: tuple[str, ...] = ()

    def allows(self, host: str, port: int, address: Address) -> bool:
        """True if `address`, one that `host` resolved to, may be dialled."""
        plain = getattr(address, "ipv4_mapped", None) or address
        return is_public(plain) or (self.allow_private and is_local(plain)) or self._is_opened(host, port, plain)

    def _is_opened(self, host: str, port: int, address: Address) -> bool:
        name = host.strip("[]").rstrip(".").casefold()
        for entry in self.allowed_hosts:
            try:
                if address in ipaddress.ip_network(entry, strict=False):
                    return True
            except ValueError:
                wanted, colon, wanted_port = entry.casefold().partition(":")
                if colon and wanted_port != str(port):
                    continue
                if name == wanted or (wanted.startswith("*.") and name.endswith(wanted[1:])):
                    return True
                with suppress(ValueError):
                    if address == ipaddress.ip_address(wanted):
                        return True
        return False


def is_public(address: Address) -> bool:
    """True for an address of the open internet that stands for itself only."""
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not any(address in network for network in _CLOSED if network.version == address.version)
    )


def is_local(address: Address) -> bool:
    """True for loopback and private networks; not for link-local, shared or metadata addresses."""
    return address not in _CLOUD_METADATA and any(
        address in network for network in _LOCAL if network.version == address.version
    )


def system_resolve(host: str, port: int) -> Sequence[AddressInfo]:
    """What the operating system's resolver says."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


def fetch(
    url: str,
    *,
    policy: FetchPolicy,
    max_bytes: int = MAX_IMAGE_BYTES,
    timeout_s: float = IMAGE_TIMEOUT_S,
    resolve: Resolve = system_resolve,
) -> bytes:
    """The content behind an http(s) URL; follows up to 5 redirects. Blocks: call it from a thread.

    Args:
        max_bytes: cap on the content, also after decompression.
        timeout_s: for everything together, however slowly the server sends.
    Raises:
        FetchRefused: scheme, address, status, size, time or redirects; the message says which and what to do.
    """
    headers = {"User-Agent": USER_AGENT, "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity"}
    reply = _exchange(_Call("GET", url, headers, None, policy, resolve, max_bytes, timeout_s))
    if not 200 <= reply.status < 300:
        raise FetchRefused(f"The server answered with status {reply.status}.")
    return reply.content


def fetcher(policy: FetchPolicy) -> Callable[[str], bytes]:
    """`fetch` under a policy, as `images.ImageSources` wants it."""
    return partial(fetch, policy=policy)


def post(
    url: str,
    body: bytes,
    *,
    headers: Mapping[str, str],
    policy: FetchPolicy,
    timeout_s: float = WEBHOOK_TIMEOUT_S,
    resolve: Resolve = system_resolve,
) -> int:
    """Posts a body and returns the status of the final answer, whatever it is; its content is not kept.

    Redirects are followed up to 5 times: 303 with a GET as HTTP asks, all others with the same POST.

    Raises:
        FetchRefused: the target may not be contacted, cannot be, or does not answer in time.
    """
    call = _Call("POST", url, dict(headers), body, policy, resolve, MAX_REPLY_BYTES, timeout_s, keep_content=False)
    return _exchange(call).status


@dataclass(frozen=True, slots=True)
class _Call:
    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes | None
    policy: FetchPolicy
    resolve: Resolve
    max_bytes: int
    timeout_s: float
    keep_content: bool = True


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    content: bytes = b""
    location: str = ""


@dataclass(slots=True)
class _Deadline:
    """Ends an exchange at a moment, even one whose server keeps sending a byte now and then.

    Time limits of sockets begin anew with each packet; so a timer shuts the connection down.
    """

    ends_s: float
    sockets: list[socket.socket] = field(default_factory=list)
    passed: bool = False

    def remaining_s(self) -> float:
        """Seconds left; raises FetchRefused when there are none."""
        left = self.ends_s - time.monotonic()
        if left <= 0 or self.passed:
            raise FetchRefused("The server took too long.")
        return left

    def watch(self, connection: socket.socket) -> None:
        """Adds a connection; a duplicate is kept, because TLS takes the original over."""
        self.sockets.append(connection.dup())

    def shut(self) -> None:
        """Ends every connection at once; readers get an end of file or an error."""
        self.passed = True
        for connection in list(self.sockets):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def _deadline(timeout_s: float) -> Iterator[_Deadline]:
    deadline = _Deadline(time.monotonic() + timeout_s)
    timer = threading.Timer(timeout_s, deadline.shut)
    timer.daemon = True
    timer.start()
    try:
        yield deadline
    finally:
        timer.cancel()
        timer.join()
        for connection in deadline.sockets:
            connection.close()


def _exchange(call: _Call) -> _Reply:
    """The final answer, after redirects."""
    method, url, body = call.method, call.url, call.body
    with _deadline(call.timeout_s) as deadline:
        for _ in range(MAX_REDIRECTS + 1):
            if _scheme(url) not in ("http", "https"):
                raise FetchRefused("Only http and https URLs are accepted.")
            reply = _request(call, method, url, body, deadline)
            if not reply.location:
                return reply
            if reply.status == 303 or method == "GET":
                method, body = "GET", None
            url = _joined(url, reply.location)
    raise FetchRefused(f"The server redirected more than {MAX_REDIRECTS} times.")


def _request(call: _Call, method: str, url: str, body: bytes | None, deadline: _Deadline) -> _Reply:
    """One request without redirects; everything that can go wrong becomes FetchRefused."""
    try:
        with _pools(call, deadline) as pools:
            timeout = urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=deadline.remaining_s())
            response = pools.request(
                method, url, body=body, headers=dict(call.headers), timeout=timeout,
                retries=False, redirect=False, preload_content=False,
            )  # fmt: skip
            try:
                location = response.headers.get("Location", "") if response.status in (301, 302, 303, 307, 308) else ""
                if location or not call.keep_content:
                    return _Reply(response.status, location=location)
                return _Reply(response.status, _content(response, call.max_bytes, deadline))
            finally:
                response.close()
    except FetchRefused:
        raise
    except (HTTPError, OSError, ValueError, zlib.error) as error:
        deadline.remaining_s()  # a connection shut by the deadline fails in many ways; say the real reason
        raise FetchRefused(f"The server could not be reached ({_reason(error)}).") from error


def _content(response: urllib3.BaseHTTPResponse, max_bytes: int, deadline: _Deadline) -> bytes:
    too_large = FetchRefused(f"The content is larger than the {max_bytes / 2**20:.0f} MiB that are accepted.")
    if response.headers.get("Content-Length", "").isdecimal() and int(response.headers["Content-Length"]) > max_bytes:
        raise too_large
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise FetchRefused(f"The server sent the compression {encoding[:20]!r} that was not asked for.")
    inflate = None if encoding in ("", "identity") else zlib.decompressobj(zlib.MAX_WBITS | 32)
    content = bytearray()
    while chunk := response.read1(64 * 1024, decode_content=False):
        deadline.remaining_s()
        content += inflate.decompress(chunk, max_bytes + 1 - len(content)) if inflate else chunk
        if len(content) > max_bytes:
            raise too_large
    deadline.remaining_s()  # a connection shut in between looks like the end of the content
    _check_complete(response)
    return bytes(content)


def _check_complete(response: urllib3.BaseHTTPResponse) -> None:
    left = response.length_remaining
    if left is not None and left > 0:
        raise FetchRefused("The server broke off before the end.")


@contextmanager
def _pools(call: _Call, deadline: _Deadline) -> Iterator[urllib3.PoolManager]:
    """Connection pools whose sockets go to checked addresses only; environment proxies are not used."""

    def dial(connection: HTTPConnection) -> socket.socket:
        return _dial(connection, call, deadline)

    plain = type("GuardedHTTPConnection", (HTTPConnection,), {"_new_conn": dial})
    secure = type("GuardedHTTPSConnection", (HTTPSConnection,), {"_new_conn": dial})
    manager = urllib3.PoolManager(ssl_context=_tls())
    manager.pool_classes_by_scheme = {
        "http": type("GuardedHTTPPool", (HTTPConnectionPool,), {"ConnectionCls": plain}),
        "https": type("GuardedHTTPSPool", (HTTPSConnectionPool,), {"ConnectionCls": secure}),
    }
    try:
        yield manager
    finally:
        manager.clear()


def _dial(connection: HTTPConnection, call: _Call, deadline: _Deadline) -> socket.socket:
    """A socket to the first reachable address of the connection's host, if all its addresses are acceptable."""
    host, port = connection.host, connection.port
    try:
        found = call.resolve(host.strip("[]"), port)
    except (OSError, UnicodeError) as error:
        raise NameResolutionError(host, connection, socket.gaierror(str(error))) from error
    for info in found:
        address = ipaddress.ip_address(str(info[4][0]).split("%")[0])
        if not call.policy.allows(host, port, address):
            raise FetchRefused(
                f"The address of {host[:100]!r} is not a public one. "
                "The operator of this server can allow it with --allow-url-hosts."
            )
    failure: OSError = OSError("the name has no address")
    for family, kind, protocol, _, target in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(min(CONNECT_TIMEOUT_S, deadline.remaining_s()))
            sock.connect(target)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            deadline.watch(sock)
        except OSError as error:
            failure = error
            sock.close()
        except FetchRefused:
            sock.close()
            raise
        else:
            return sock
    raise NewConnectionError(connection, str(failure))


@cache
def _tls() -> ssl.SSLContext:
    """Certificates of the system and of certifi, checked against the host name."""
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def _scheme(url: str) -> str:
    """The scheme of a URL in lower case, "" if it cannot be parsed."""
    try:
        return urlsplit(url).scheme.lower()
    except ValueError:
        return ""


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise FetchRefused("The server redirected to something that is no URL.") from error


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", None)
    text = str(cause if isinstance(cause, Exception) else error)
    return f"{type(error).__name__}: {text.rsplit('>: ', 1)[-1][:200]}"
