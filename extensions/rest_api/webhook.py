"""Webhooks: a durable outbox of who is to be told of which task's end, and the delivery itself."""

import asyncio
import base64
import binascii
import contextlib
import hashlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import orjson

from modules.errors import FetchRefused
from modules.events import Event, is_final
from modules.files_atomic import write_atomically
from modules.jobs import Job
from modules.record import Record
from modules.version import VERSION

logger = logging.getLogger(__name__)

TIMEOUT_S = 5.0
RETRY_AFTER_S = (1.0, 5.0)
AT_ONCE = 4
_SECRET_PREFIX = "whsec_"


WebhookStyle: TypeAlias = Literal["record", "legacy"]


class Post(Protocol):
    """Sends a body to a URL that a stranger named."""

    def __call__(self, url: str, body: bytes, headers: dict[str, str], timeout_s: float) -> int:
        """The HTTP status of the answer, redirects followed.

        Raises:
            FetchRefused: the URL may not be contacted, or nobody answered in time.
        """


class WebhookSender:
    """Sends one record to one URL, signed if there is a secret (Standard Webhooks)."""

    def __init__(self, post: Post, *, secret: str = "", clock_s: Callable[[], float] = time.time) -> None:
        """Send through `post`.

        Args:
            secret: `whsec_` and base64, or any text; "" sends without a signature.
        """
        self._post = post
        self._key = secret_bytes(secret)
        self._clock_s = clock_s

    def __call__(self, url: str, record: Record, body: bytes) -> None:
        """Deliver once; blocks.

        Raises:
            FetchRefused: not delivered; the message says why.
        """
        headers = {
            "Content-Type": "application/json",
            "User-Agent": f"Focale/{VERSION}",
            "X-Task-Id": record.task_id,
            "X-Task-Status": record.task_status.value,
            **self._signature(record.task_id, body),
        }
        status = self._post(url, body, headers, TIMEOUT_S)
        if not 200 <= status < 300:
            raise FetchRefused(f"The receiver answered {status}.")

    def _signature(self, task_id: str, body: bytes) -> dict[str, str]:
        if not self._key:
            return {}
        moment = str(int(self._clock_s()))
        signed = hmac.new(self._key, f"{task_id}.{moment}.".encode() + body, hashlib.sha256).digest()
        return {
            "webhook-id": task_id,
            "webhook-timestamp": moment,
            "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
        }


def secret_bytes(secret: str) -> bytes:
    """The key in a webhook secret; text that is not `whsec_` and base64 counts as it is."""
    if secret.startswith(_SECRET_PREFIX):
        with contextlib.suppress(binascii.Error, ValueError):
            return base64.b64decode(secret.removeprefix(_SECRET_PREFIX), validate=True)
    return secret.encode()


class Expected(NamedTuple):
    """Who is to be told of a task's end, and in which shape."""

    task_id: str
    url: str
    style: WebhookStyle


class Outbox:
    """One small file per task whose end somebody wants to hear of.

    The file is written before the task is accepted and removed when the webhook is delivered or given up, so that
    neither a crash nor a restart loses one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        send: Callable[[str, Record, bytes], None],
        find: Callable[[str], Record | None],
        body: Callable[[Record, WebhookStyle], dict[str, Any]],
        retry_after_s: tuple[float, ...] = RETRY_AFTER_S,
    ) -> None:
        """Keep the files in `folder`, made when first needed.

        Args:
            send: delivers once or raises FetchRefused. find: the stored record of a task. body: what is sent of it.
            retry_after_s: pauses before the second and further attempts.
        """
        self._folder = folder
        self._send = send
        self._find = find
        self._body = body
        self._retry_after_s = retry_after_s
        self._expected: dict[str, Expected] = {}
        self._deliveries: set[asyncio.Task[None]] = set()
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="focale-webhook")

    @asynccontextmanager
    async def expecting(self, task_id: str, url: str, style: WebhookStyle = "record") -> AsyncIterator[None]:
        """Expect the end of a task that is accepted within this context; an error in it takes that back."""
        if not url or task_id in self._expected:
            yield
            return
        expected = Expected(task_id, url, style)
        await asyncio.to_thread(self._write, expected)
        self._expected[task_id] = expected
        try:
            yield
        except BaseException:
            self._expected.pop(task_id, None)
            self._file(task_id).unlink(missing_ok=True)
            raise

    def on_event(self, job: Job, event: Event) -> None:
        """Begin to deliver when an expected task ends."""
        if is_final(event) and (expected := self._expected.pop(job.task_id, None)) is not None:
            self._begin(expected)

    async def start(self) -> None:
        """Take up what an earlier server left: deliver for ended tasks, expect the end of the others."""
        for expected in await asyncio.to_thread(self._read_all):
            record = await asyncio.to_thread(self._find, expected.task_id)
            if record is None:
                self._file(expected.task_id).unlink(missing_ok=True)
            elif record.task_status.is_final:
                self._begin(expected)
            else:
                self._expected[expected.task_id] = expected

    async def stop(self) -> None:
        """End the deliveries in work; they begin again at the next start."""
        for delivery in self._deliveries:
            delivery.cancel()
        await asyncio.gather(*self._deliveries, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _begin(self, expected: Expected) -> None:
        delivery = asyncio.create_task(self._deliver(expected), name=f"focale-webhook-{expected.task_id}")
        self._deliveries.add(delivery)
        delivery.add_done_callback(self._deliveries.discard)

    async def _deliver(self, expected: Expected) -> None:
        """Try, pause, try again; the file goes when it is over, either way."""
        try:
            for attempt, pause_s in enumerate((0.0, *self._retry_after_s), 1):
                await asyncio.sleep(pause_s)
                if await self._attempt(expected, attempt):
                    break
            else:
                logger.warning("Webhook of task %s is given up after %d attempts", expected.task_id, attempt)
            self._file(expected.task_id).unlink(missing_ok=True)
        except Exception:  # a webhook's failure is nobody else's
            logger.exception("Webhook of task %s failed", expected.task_id)

    async def _attempt(self, expected: Expected, attempt: int) -> bool:
        """True when there is nothing left to do."""
        record = await asyncio.to_thread(self._find, expected.task_id)
        if record is None:
            return True
        body = orjson.dumps(self._body(record, expected.style))
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._threads, self._send, expected.url, record, body)
        except FetchRefused as error:
            logger.warning("Webhook of task %s, attempt %d: %s", expected.task_id, attempt, error)
            return False
        logger.info("Webhook of task %s is delivered", expected.task_id)
        return True

    def _file(self, task_id: str) -> Path:
        return self._folder / f"{task_id}.json"

    def _write(self, expected: Expected) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file(expected.task_id), json.dumps(expected._asdict()).encode())

    def _read_all(self) -> list[Expected]:
        found = []
        for path in sorted(self._folder.glob("*.json")) if self._folder.is_dir() else []:
            try:
                entry = json.loads(path.read_text(encoding="utf-8"))
                style: WebhookStyle = "legacy" if entry.get("style") == "legacy" else "record"
                found.append(Expected(str(entry["task_id"]), str(entry["url"]), style))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                logger.warning("Outbox file %s is left alone: it cannot be read (%s)", path.name, error)
        return found
