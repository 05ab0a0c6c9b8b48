"""What the server remembers between starts and nobody configures: two switches, and the secret that signs URLs."""

import contextlib
import json
import logging
import os
import secrets
from pathlib import Path

logger = logging.getLogger(__name__)

FILE_NAME = "settings_state.json"
_SECRET_BYTES = 32


class ServerState:
    """The remembered values; a change is written at once.

    A file that cannot be read or written costs only the memory: the server runs with fresh values.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Read what an earlier server left.

        Args:
            path: JSON file, readable by its owner only; None remembers nothing.
        """
        self._path = path
        stored = _read(path)
        secret = stored.get("secret")
        self._api_enabled = stored.get("api_enabled") is not False
        self._queue_paused = stored.get("queue_paused") is True
        self._secret = secret if isinstance(secret, str) and len(secret) >= _SECRET_BYTES else ""
        if not self._secret:
            self._secret = secrets.token_hex(_SECRET_BYTES)
            self._write()

    @property
    def api_enabled(self) -> bool:
        """True while the routes of the API answer."""
        return self._api_enabled

    @api_enabled.setter
    def api_enabled(self, enabled: bool) -> None:
        if enabled != self._api_enabled:
            self._api_enabled = enabled
            logger.info("The API is switched %s.", "on" if enabled else "off")
            self._write()

    @property
    def queue_paused(self) -> bool:
        """True while no waiting task is started, because somebody said so; a restart does not change that."""
        return self._queue_paused

    @queue_paused.setter
    def queue_paused(self, paused: bool) -> None:
        if paused != self._queue_paused:
            self._queue_paused = paused
            logger.info("The queue is %s.", "paused" if paused else "resumed")
            self._write()

    @property
    def secret(self) -> bytes:
        """Key of every signature this server makes; the same after a restart."""
        return self._secret.encode()

    def _write(self) -> None:
        if self._path is None:
            return
        partial = self._path.with_name(self._path.name + ".part")
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                switches = {"api_enabled": self._api_enabled, "queue_paused": self._queue_paused}
                json.dump({**switches, "secret": self._secret}, file)
            os.replace(partial, self._path)
        except OSError as error:
            logger.warning("%s cannot be written: %s.", self._path.name, error.strerror)
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _read(path: Path | None) -> dict[str, object]:
    """The stored object; a missing or unreadable file counts as empty."""
    if path is None or not path.is_file():
        return {}
    try:
        value: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        logger.warning("%s is ignored: it cannot be read (%s).", path.name, error)
        return {}
    return value if isinstance(value, dict) else {}
