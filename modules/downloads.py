"""Fetches model files that the user or a preset named: resumable, verified, renamed when whole.

Whoever downloads a file holds a lock on its part, so that it is fetched once however many tasks and servers want it.
"""

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, Literal
from urllib.parse import urljoin, urlsplit, urlunsplit

from modules.downloads_part import Part, Version, part_path, size_on_disk
from modules.errors import DownloadFailed, StorageFull
from modules.files import SUFFIXES
from modules.version import VERSION

if TYPE_CHECKING:
    from requests import Response, Session

logger = logging.getLogger(__name__)

HUB: Final = "huggingface.co"
CONNECT_TIMEOUT_S: Final = 10.0
READ_TIMEOUT_S: Final = 30.0
SIZE_TIMEOUT_S: Final = 4.0
MAX_REDIRECTS: Final = 8
MAX_FAILURES: Final = 4
MAX_RESTARTS: Final = 2  # from the first byte, because what came does not fit what the server has
PROGRESS_BYTES: Final = 1 << 20  # a connection that brought this much does not count as failed
CHUNK_BYTES: Final = 1 << 18
SPARE_BYTES: Final = 64 << 20  # left free on the disk
TURN_S: Final = 0.2  # between two looks at a lock or at the clock; the caller gets a turn each time
FIRST_PAUSE_S: Final = 1.0
MAX_HEADER_BYTES: Final = 100 << 20  # of a safetensors file

_SHA256 = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_GONE = {401: "it needs a login", 403: "it needs a login or a licence to be accepted", 404: "there is no such file"}

Stage = Literal["waiting", "receiving", "retrying", "checking"]


@dataclass(frozen=True, slots=True)
class Transfer:
    """How far a download is.

    stage: waiting for another download of the same file; receiving; retrying after a pause; checking what came.
    done, total: bytes on the disk and of the whole file; total is None while it is unknown.
    """

    stage: Stage
    done: int
    total: int | None


@dataclass(frozen=True, slots=True)
class Source:
    """Where a file comes from.

    url: as it was written down, without fragment. address: the URL to ask, with the mirror in place of the hub.
    sha256: hex digest from the URL's fragment `#sha256=…`, "" if it has none.
    """

    url: str
    address: str
    sha256: str = ""

    @property
    def shown(self) -> str:
        """The address for people: without user, password and query, which may hold a key."""
        parts = urlsplit(self.address)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    @property
    def is_hub(self) -> bool:
        """True for files of the hub, whose ETag of a large file is its SHA-256."""
        return (urlsplit(self.url).hostname or "") == HUB


def source_of(url: str, *, mirror: str = "") -> Source:
    """The source that a URL names.

    Args:
        mirror: stands in for huggingface.co: a host, or a URL with or without a path.
    Raises:
        DownloadFailed: it is no http or https URL.
    """
    try:
        parts = urlsplit(url.strip())
        host = parts.hostname
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme.lower() not in ("http", "https") or not host:
        raise DownloadFailed(f"{url[:200]!r} is no source of a file; it must begin with http:// or https://.")
    digest = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", parts.fragment)
    plain = urlunsplit(parts._replace(fragment=""))
    address = plain
    if mirror and host == HUB:
        base = mirror if "://" in mirror else f"https://{mirror}"
        query = f"?{parts.query}" if parts.query else ""
        address = f"{base.rstrip('/')}{parts.path}{query}"
    return Source(plain, address, digest[1].lower() if digest else "")


def place_of(folder: Path, name: str) -> Path:
    """The file that a name from a preset means below a folder.

    Raises:
        DownloadFailed: the name leads out of the folder, hides a file, or is none a model may have.
    """
    parts = PurePosixPath(name.replace("\\", "/")).parts
    is_plain = all(part not in ("", "..", "/") and not part.startswith(".") for part in parts)
    is_model = name.lower().endswith((*SUFFIXES, ".pt"))
    if not parts or not is_plain or not is_model or re.search(r'[:*?"<>|\x00-\x1f]', name):
        raise DownloadFailed(f"{name!r} cannot be the name of a downloaded file.")
    return folder.joinpath(*parts)


def download(source: Source, target: Path) -> Iterator[Transfer]:
    """Fetch a file; it stands at `target` when the generator ends, whole and verified, and never before.

    Yields whenever something moved, at least every half minute. Closing the generator ends the download; what came so
    far is kept, and the next download of the file goes on there. Blocks: run it in a thread.

    Raises:
        DownloadFailed: the file cannot be had, or is not what it should be. StorageFull: the disk cannot hold it.
    """
    import requests

    part = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while not target.is_file() and part is None:
            part = Part.opened(target, source.url)
            if part is None:  # somebody else is at it
                yield Transfer("waiting", size_on_disk(part_path(target)), None)
                time.sleep(TURN_S)
        if part is None or target.is_file():
            return
        with requests.Session() as session:
            yield from _received(session, source, part)
        yield from _verified(source, part)
        part.finish(target)
        logger.info("Downloaded %s from %s", target, source.shown)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageFull(f"{target.name} cannot be written to {target.parent}: {reason}.") from error
    finally:
        if part is not None:
            part.close()


def size_of(source: Source) -> int | None:
    """Bytes of the file, as its server says within a few seconds; None if it does not. Blocks."""
    import requests

    with suppress(DownloadFailed, _Transient, requests.RequestException), requests.Session() as session:
        response, hints = _opened(session, source, {}, method="HEAD", timeout=(SIZE_TIMEOUT_S, SIZE_TIMEOUT_S))
        response.close()
        if response.status_code == HTTPStatus.OK:
            return hints.total or _number(response.headers.get("Content-Length"))
    return None


# -- what comes over the wire -----------------------------------------------------------------------------------------


class _Transient(Exception):
    """An attempt failed in a way that may pass: the sentence says how."""


class _Changed(_Transient):
    """What came so far belongs to another version of the file, or cannot be continued, and was thrown away."""

    def __init__(self) -> None:
        super().__init__("the file is another one than before")


def _received(session: "Session", source: Source, part: Part) -> Iterator[Transfer]:
    """Receive the rest of a file, in as many connections as it takes."""
    import requests
    from urllib3.exceptions import HTTPError

    failures = restarts = best = 0
    while True:
        try:
            yield from _attempt(session, source, part)
            return
        except (_Transient, requests.RequestException, HTTPError) as error:
            if isinstance(error, requests.exceptions.SSLError):
                raise _failed(source, part, "its certificate cannot be verified") from error
            if isinstance(error, requests.exceptions.InvalidSchema | requests.exceptions.InvalidURL):
                raise _failed(source, part, "its address cannot be used") from error
            restarts += isinstance(error, _Changed)
            best = 0 if isinstance(error, _Changed) else best
            failures = 0 if part.size >= best + PROGRESS_BYTES else failures + 1
            best = max(best, part.size)
            reason = str(error) if isinstance(error, _Transient) else _reason(error)
            if failures >= MAX_FAILURES or restarts > MAX_RESTARTS:
                raise _failed(source, part, reason) from error
            logger.info("Download of %s: %s; going on at byte %d", source.shown, reason, part.size)
        yield from _pause(FIRST_PAUSE_S * 2 ** max(0, failures - 1), part)


def _pause(seconds: float, part: Part) -> Iterator[Transfer]:
    ends_s = time.monotonic() + seconds
    while (left := ends_s - time.monotonic()) > 0:
        yield Transfer("retrying", part.size, part.known.total)
        time.sleep(min(TURN_S, left))


def _attempt(session: "Session", source: Source, part: Part) -> Iterator[Transfer]:
    """One connection: from where the part ends to the end of the file, or to a failure."""
    if part.size and part.size == part.known.total:
        return
    validator = part.known.validator
    asked = {"Range": f"bytes={part.size}-", "If-Range": validator} if part.size and validator else {}
    response, hints = _opened(session, source, asked)
    try:
        _refuse_wrong(response, source, part)
        _position(response, hints, source, part)
        _check_space(part)
        yield Transfer("receiving", part.size, part.known.total)
        while chunk := response.raw.read1(CHUNK_BYTES, decode_content=False):
            part.write(chunk)
            if part.known.total is not None and part.size > part.known.total:
                part.discard()
                raise _failed(source, part, "more bytes came than the file has")
            yield Transfer("receiving", part.size, part.known.total)
    finally:
        response.close()
    if part.known.total is None:
        part.known = replace(part.known, total=part.size)
    elif part.size < part.known.total:
        raise _Transient("the connection broke off")


def _opened(
    session: "Session",
    source: Source,
    headers: Mapping[str, str],
    *,
    method: str = "GET",
    timeout: tuple[float, float] = (CONNECT_TIMEOUT_S, READ_TIMEOUT_S),
) -> "tuple[Response, Version]":
    """The final answer after redirects, and what the first one, which is the hub's, says about the file."""
    url, hints = source.address, Version(source.url, sha256=source.sha256)
    fixed = {"User-Agent": f"Focale/{VERSION}", "Accept-Encoding": "identity", **headers}
    for _ in range(MAX_REDIRECTS + 1):
        response = session.request(method, url, headers=fixed, stream=True, allow_redirects=False, timeout=timeout)
        hints = _with_hints(hints, response.headers, is_hub=source.is_hub and url == source.address)
        location = response.headers.get("Location", "")
        if response.status_code not in (301, 302, 303, 307, 308) or not location:
            return response, hints
        response.close()
        following = urljoin(url, location)
        schemes = urlsplit(url).scheme.lower(), urlsplit(following).scheme.lower()
        if schemes[1] not in ("http", "https") or schemes == ("https", "http"):
            raise DownloadFailed(f"{source.shown} leads to an address that is not safe to use.")
        url = following
    raise DownloadFailed(f"{source.shown} leads in a circle: more than {MAX_REDIRECTS} redirects.")


def _with_hints(hints: Version, headers: Mapping[str, str], *, is_hub: bool) -> Version:
    """Adds what the hub says of large files: length and SHA-256."""
    size = _number(headers.get("X-Linked-Size"))
    tag = headers.get("X-Linked-Etag") or (headers.get("ETag", "") if is_hub else "")
    digest = _SHA256.fullmatch(tag.strip().strip('"'))
    return replace(
        hints,
        total=hints.total if size is None else size,
        sha256=hints.sha256 or (digest[1] if digest else ""),
    )


def _refuse_wrong(response: "Response", source: Source, part: Part) -> None:
    """Raise for every answer that brings no bytes of the file."""
    status = response.status_code
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        part.discard()
        raise _Changed
    if status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or status >= 500:
        raise _Transient(f"the server answered {status}")
    if status not in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        raise _failed(source, part, _GONE.get(status, f"the server answered {status}"))
    if response.headers.get("Content-Type", "").lower().startswith("text/html"):
        raise _failed(source, part, "the server sent a web page instead")
    if response.headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
        raise _failed(source, part, "the server sent it compressed, which was not asked for")


def _position(response: "Response", hints: Version, source: Source, part: Part) -> None:
    """Make the part end where the bytes of the answer begin."""
    headers = response.headers
    now = replace(hints, etag=headers.get("ETag", ""), last_modified=headers.get("Last-Modified", ""))
    if response.status_code == HTTPStatus.PARTIAL_CONTENT:
        found = _CONTENT_RANGE.match(headers.get("Content-Range", ""))
        is_next = found is not None and int(found[1]) == part.size
        total = _number(found[2]) if found is not None else None
        same_length = None in (total, part.known.total) or total == part.known.total
        same_version = now.validator in ("", part.known.validator)
        if not (is_next and same_length and same_version):
            part.discard()
            raise _Changed
        part.known = replace(part.known, total=part.known.total or total)
        return
    length = _number(headers.get("Content-Length"))
    if length is not None and now.total is not None and length != now.total:
        raise _failed(source, part, f"the server has {length} bytes where the file has {now.total}")
    total = now.total if length is None else length
    if total is None and not now.sha256 and headers.get("Transfer-Encoding", "").lower() != "chunked":
        raise _failed(source, part, "the server does not say how long it is")
    part.begin(replace(now, total=total))


def _check_space(part: Part) -> None:
    """Raises StorageFull when the rest of the file does not fit on the disk."""
    if part.known.total is None:
        return
    needed = part.known.total - part.size
    free = shutil.disk_usage(part.folder).free
    if free < needed + SPARE_BYTES:
        raise StorageFull(
            f"{part.name} needs {shown_size(needed)} more and only {shown_size(free)} are free in {part.folder}; "
            "make room and try again."
        )


# -- whether it is what it should be ----------------------------------------------------------------------------------


def _verified(source: Source, part: Part) -> Iterator[Transfer]:
    """Check length, SHA-256 where it is known, and whether a safetensors file is whole."""
    wanted = source.sha256 or part.known.sha256
    if wanted:
        digest, done = hashlib.sha256(), 0
        for block in part.blocks():
            digest.update(block)
            done += len(block)
            yield Transfer("checking", done, part.size)
        if digest.hexdigest() != wanted:
            part.discard()
            raise _failed(source, part, "its SHA-256 is not the one it should have, so it was thrown away")
    if part.name.endswith(".safetensors") and _safetensors_size(part) != part.size:
        part.discard()
        raise _failed(source, part, "it is no whole safetensors file, so it was thrown away")


def _safetensors_size(part: Part) -> int | None:
    """Bytes the file should have by its own header, None if it has none."""
    length = int.from_bytes(part.head(8), "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, part.size):
        return None
    try:
        header = json.loads(part.head(8 + length)[8:])
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


# -- words ------------------------------------------------------------------------------------------------------------


def shown_size(count: int) -> str:
    """A number of bytes for people, in decimal units: "6.6 GB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _failed(source: Source, part: Part, reason: str) -> DownloadFailed:
    return DownloadFailed(
        f"{part.name} could not be downloaded from {source.shown}: {reason}. "
        f"Try again later, or put the file into {part.folder} yourself."
    )


def _reason(error: Exception) -> str:
    """What went wrong with a connection, in a few words."""
    name = type(error).__name__
    if "Timeout" in name:
        return "the server does not answer"
    if "NameResolution" in repr(error):
        return "its server cannot be found"
    return "the connection broke off" if "Protocol" in name or "Incomplete" in name else "its server cannot be reached"


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
