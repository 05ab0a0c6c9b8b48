"""Signatures on URLs and cookies: whoever holds one was given it by this server."""

import base64
import hashlib
import hmac
import time
from collections.abc import Iterable
from urllib.parse import parse_qsl

SIGNATURE_KEY = "sig"
_DIGEST_BYTES = 18  # 144 bits, 24 characters without padding


class UrlSigner:
    """Signs paths of files, so that a URL handed out works where no header can be sent, in `<img>` for example."""

    def __init__(self, secret: bytes, *, enabled: bool) -> None:
        """Sign with `secret`; when not enabled no URL needs a signature and none gets one."""
        self._secret = secret
        self._enabled = enabled

    def query(self, path: str) -> str:
        """What to append to the URL of `path` (decoded, with its leading slash): `?sig=…`, or nothing."""
        return f"?{SIGNATURE_KEY}={self._signature(path)}" if self._enabled else ""

    def accepts(self, path: str, query: bytes) -> bool:
        """True when the raw query string carries the right signature of `path`."""
        pairs = parse_qsl(query.decode("latin-1"), max_num_fields=50) if query.count(b"&") < 50 else []
        given = next((value for key, value in pairs if key == SIGNATURE_KEY), "")
        return bool(given) and hmac.compare_digest(given.encode(), self._signature(path).encode())

    def _signature(self, path: str) -> str:
        digest = hmac.new(self._secret, b"url\0" + path.encode("utf-8", "surrogatepass"), hashlib.sha256).digest()
        return base64.urlsafe_b64encode(digest[:_DIGEST_BYTES]).decode()


def sign_session(secret: bytes, api_key: str, expires_s: int) -> str:
    """A cookie value that proves that `api_key` was known; it ends with the key or at `expires_s` (Unix time)."""
    proof = hmac.new(secret, f"session\0{expires_s}\0{api_key}".encode(), hashlib.sha256).hexdigest()
    return f"{expires_s}.{proof}"


def session_key(secret: bytes, cookie: str, api_keys: Iterable[str], now_s: float | None = None) -> str | None:
    """The API key behind a cookie value, or None; every key is tried, so that the time tells nothing."""
    expires, _dot, _proof = cookie.partition(".")
    if not (expires.isascii() and expires.isdecimal() and len(expires) < 16):
        return None
    if int(expires) < (time.time() if now_s is None else now_s):
        return None
    found = None
    for api_key in api_keys:
        if hmac.compare_digest(cookie.encode(), sign_session(secret, api_key, int(expires)).encode()):
            found = api_key
    return found
