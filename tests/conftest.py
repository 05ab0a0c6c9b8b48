"""What every test may use; nothing here needs weights, a network or a display."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from modules.settings import Settings

os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")
# How fast a machine is at this moment is no property of the code.
hypothesis_settings.register_profile("focale", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("focale")
LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuses connections to other machines, so that a test which needs one fails here and not elsewhere."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and not str(address[0]).startswith(LOOPBACK):
            raise OSError(f"tests may not connect to {address[0]}")
        connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded)
    yield
    patch.undo()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a fresh program folder, with free ports and the folders made."""
    loaded = Settings.load(["--port", "0", "--temp-path", str(tmp_path / "temp")], env={}, root=tmp_path)
    loaded.prepare()
    return loaded
