"""A real server with history, queue and worker process, which draws toy pictures slowly: what the rounds kill."""

import hashlib
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from modules import serving
from modules.assembly import build_services
from modules.control import Control
from modules.errors import Interrupted
from modules.events import Event, Finished, ImageSaved, ImageSkipped, Progress, Skipped, Stopped
from modules.extensions import load_extensions
from modules.record import Record
from modules.request import from_params
from modules.save import save_image
from modules.settings import Settings
from modules.worker import Workbench

STEP_S = 0.01


class ToyWorkbench:
    """Draws a picture that follows from its seed, a step every 10 ms."""

    def __init__(self, outputs: Path) -> None:
        self.outputs = outputs

    def warm_up(self) -> None:
        """Nothing to load."""

    def rest(self) -> None:
        """Nothing to give back."""

    def call(self, tool: str, payload: Mapping[str, Any]) -> Any:
        """No tools here."""
        raise NotImplementedError(tool)

    def run(self, record: Record, control: Control) -> Iterator[Event]:
        """A few steps per image, then its file."""
        request = from_params(record.req_params)
        made = bool(record.result)
        for index in range(request.image_number):
            if index in record.settled:
                continue
            skipped = False
            for step in range(1, 6):
                time.sleep(STEP_S)
                try:
                    control.check()
                except Interrupted:
                    yield Stopped()
                    return
                skipped = skipped or control.take_skips() > 0
                yield Progress(step * 10, f"Sampling step {step}/5, image {index + 1}/{request.image_number} ...")
            if skipped:
                yield ImageSkipped(index)
                continue
            made = True
            yield self._save(request.image_seed + index, index)
        yield Finished() if made else Skipped()

    def _save(self, seed: int, index: int) -> ImageSaved:
        saved = save_image(picture_of(seed), root=self.outputs, output_format="png", now=datetime.now())
        return ImageSaved(saved.path, index, seed, saved.width, saved.height)


def picture_of(seed: int) -> Image.Image:
    """The picture of a seed: one colour."""
    red, green, blue = hashlib.sha256(str(seed).encode()).digest()[:3]
    return Image.new("RGB", (16, 16), (red, green, blue))


def make_toy(outputs: Path) -> Workbench:
    """The workbench, made in the worker."""
    return ToyWorkbench(outputs)


def main(argv: list[str]) -> None:
    """Serve until killed; prints `ready` and the worker's process id when connections are accepted."""
    loaded = load_extensions()
    settings = Settings.load(["--nowebui", *argv], extra=loaded.argument_adders())
    settings, listeners = serving.bind(settings)
    services = build_services(settings, workbench=partial(make_toy, settings.paths.outputs))
    application = serving.assemble(services, loaded.extensions, api_ports=listeners.api_ports)
    serving.serve(application, listeners, on_ready=lambda: print("ready", settings.webui_port, flush=True))


if __name__ == "__main__":
    main(sys.argv[1:])
